"""HTTP server of one model, in OpenAI's format. Not for clinical use.

`worker` owns the model in one thread; `app` is HTTP around it. Neither knows how replies are
generated, and the worker knows nothing of HTTP.
"""
