"""Feature rows: a declared schema, packed to bytes when a store is filled, decoded in bulk when a request needs
them."""
