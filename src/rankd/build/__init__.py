"""From a trained run to an artifact: export of the graphs, parity with the reference, packing. Needs the train extra."""
