"""What front ends share that follow a model while it runs: symbols for its tensors, and sizes that remember
where they come from; steps, recordings that agree, and what they say. No framework in it."""
