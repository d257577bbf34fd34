"""An HTTP server with OpenAI's chat completions: `requests` are checked, `batching` decodes them, `app` answers."""
