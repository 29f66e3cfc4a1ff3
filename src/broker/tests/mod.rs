//! Tests of the broker, written from the documentation: scenarios as text, and a naive model under random schedules.

mod audit;
mod facts;
mod parse;
mod prng;
mod render;
mod script;

mod cancel_resume;
mod coverage;
mod edges;
mod explain;
mod finish;
mod inbox_outbox;
mod lanes;
mod lease;
mod limits;
mod promises;
mod retention;
mod retry;
mod sessions;
mod submit;

mod model;
mod oracle;
mod schedule;
