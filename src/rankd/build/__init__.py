"""From a trained run to an artifact: export, parity with the reference, packing. Needs the train extra."""
