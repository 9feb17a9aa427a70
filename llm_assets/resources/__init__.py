"""What assets are given: composed settings, tracking, the Bento builder."""
