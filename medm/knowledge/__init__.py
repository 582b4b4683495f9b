"""Knowledge: graph, memory, fusion. Nothing is registered yet."""
