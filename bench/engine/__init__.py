"""The generation engine beside what people would use instead: workloads, contenders, the interleaved run."""
