"""Drawing images: samplers, the diffusers pipeline, editing, the Gradio page."""
