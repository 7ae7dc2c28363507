"""Who is computed when: a waiting line in front of the executors of a model."""
