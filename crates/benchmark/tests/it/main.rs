//! Tests of the framework on a scenario that costs nothing, and of the real registry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod browser;
mod cli;
mod compare;
mod crash;
mod export;
mod methods;
mod report;
mod runner;
mod statistics;
mod store;
mod toy;
mod verdict;
mod verify;
