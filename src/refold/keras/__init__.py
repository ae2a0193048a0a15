"""refold for Keras 3, on its TensorFlow, JAX and torch backends."""
