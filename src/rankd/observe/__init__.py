"""Seeing what happens: stage clocks now; metrics of the server beside them."""
