//! Tests of the pool, the availability and the watch together with the recorder.

mod simulation;
