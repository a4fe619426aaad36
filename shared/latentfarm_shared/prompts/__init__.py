"""The prompt language: attention, chunks, and embedding names, shared by producer and worker."""
