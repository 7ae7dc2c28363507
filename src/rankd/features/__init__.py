"""From ids to columns: the schema of features, where rows come from, and how a request's arrays are put together."""
