"""The engine that speaks the OpenAI-compatible protocol itself, over kept-alive connections."""
