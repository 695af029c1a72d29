"""What yields a score map."""
