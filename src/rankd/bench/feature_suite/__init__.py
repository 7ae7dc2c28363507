"""`rankd bench features`: rows kept next to the model, beside none and a dict."""
