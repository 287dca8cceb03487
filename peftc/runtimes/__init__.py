"""What lets other people's libraries load factors; no other room imports it."""
