"""``ds-fp6 serve``: an OpenAI-compatible HTTP server on MII's async pipeline."""
