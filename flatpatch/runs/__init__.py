"""Plan, carry out and record runs."""
