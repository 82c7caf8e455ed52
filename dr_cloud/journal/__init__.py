"""The journal in the store: frames, objects, keyframes, checkpoints; its one writer, its readers, its catalogue."""
