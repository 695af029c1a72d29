"""Preparation of rotating image stacks: bad pixels, recentring, frame selection."""
