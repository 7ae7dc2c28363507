"""Who is computed when, in how many parts, on which executor: admission, policy, and the threads that do it."""
