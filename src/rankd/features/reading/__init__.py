"""What a request reads: rows and histories from a store, what is kept of them here, and events written through."""
