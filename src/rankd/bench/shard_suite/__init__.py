"""Suite `shards`: what dividing embedding tables over processes costs, for each way to divide them."""
