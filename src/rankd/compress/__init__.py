"""Smaller models of the same family: pruning, factorising, sharing, students, distillation, the accuracy gate."""
