"""What compression is worth beside the model as a plain user would serve it, cause by cause."""
