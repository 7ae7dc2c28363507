"""`rankd bench schedule`: the schedule beside first come, first served, for real and simulated."""
