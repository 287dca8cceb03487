"""Folders and files, without torch: sources, headers, manifests, artifacts, jobs."""
