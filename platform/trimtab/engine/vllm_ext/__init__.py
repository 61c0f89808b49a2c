"""Extensions of vLLM: worker classes, weight loader, signal capture, patches."""
