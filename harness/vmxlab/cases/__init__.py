"""What a test says: the case, its guest program, its reactions and its limits."""
