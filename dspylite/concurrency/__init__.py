"""Running many: batches on threads and tasks, and programs called from the other side."""
