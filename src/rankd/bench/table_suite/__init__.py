"""`rankd bench tables`: pooled look-up beside torch and FBGEMM."""
