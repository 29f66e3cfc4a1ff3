//! `dagorama bench`: what this broker does on this machine, with every sync on.
//!
//! The broker is a process of its own, started as a user would; Rust workers run in this process, Python workers in theirs. Every line says on which
//! file system, how many `fdatasync`s the broker made, and how many the disk alone can make. Medians of several rounds, with their spread.

mod place;
mod workloads;

use std::process::ExitCode;

use serde_json::{Value, json};

use crate::cli::{Bench, Workload};
use crate::commands::say;

const ALL: [Workload; 9] = [
    Workload::Fanout,
    Workload::Sustained,
    Workload::FanoutPython,
    Workload::Chain,
    Workload::Diamonds,
    Workload::Idle,
    Workload::Submit,
    Workload::Memory,
    Workload::Restart,
];

/// Runs the workloads one after the other, each on a fresh store.
pub async fn run(options: Bench) -> ExitCode {
    let disk = match place::disk(&options.data_dir) {
        Ok(disk) => disk,
        Err(error) => {
            eprintln!("dagorama bench: {error}");
            return ExitCode::from(crate::error::exit::USAGE);
        }
    };
    if !options.json {
        eprintln!(
            "{} on {}: {} fdatasyncs/s of 4 KiB by the disk alone (p50 {} µs)",
            disk.directory, disk.file_system, disk.syncs_per_second, disk.sync_p50_us
        );
    }
    let chosen = if options.workloads.is_empty() {
        ALL.to_vec()
    } else {
        options.workloads.clone()
    };
    let mut code = ExitCode::SUCCESS;
    for workload in chosen {
        match workloads::measure(workload, &options).await {
            Ok(mut report) => {
                report["file_system"] = json!(disk.file_system);
                report["disk_syncs_per_second"] = json!(disk.syncs_per_second);
                report["disk_sync_p50_us"] = json!(disk.sync_p50_us);
                report["profile"] = json!(if cfg!(debug_assertions) {
                    "debug assertions: not to be quoted"
                } else {
                    "release"
                });
                if options.json {
                    say(&report);
                } else {
                    say(line(&report));
                }
            }
            Err(error) => {
                eprintln!("dagorama bench: {workload:?}: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

fn line(report: &Value) -> String {
    let fields: Vec<String> = report
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| {
            ![
                "workload",
                "file_system",
                "disk_syncs_per_second",
                "disk_sync_p50_us",
                "profile",
            ]
            .contains(&name.as_str())
        })
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    format!(
        "{}: {}",
        report["workload"].as_str().unwrap_or_default(),
        fields.join(", ")
    )
}
