//! The program: reads the command line and does what it says.

use std::process::ExitCode;

use clap::Parser;
use dagorama::cli::{Cli, Command};
use dagorama::commands::{self, Failed, Outcomes};
use dagorama::{bench, demo, server, telemetry};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; everything else is wrong usage.
            drop(error.print());
            if !error.use_stderr() {
                return ExitCode::SUCCESS;
            }
            if std::env::args_os().any(|argument| argument == "--json") {
                commands::say(
                    serde_json::json!({"code": "INVALID_REQUEST", "message": error.to_string().trim_end()}),
                );
            }
            return ExitCode::from(dagorama::error::exit::USAGE);
        }
    };
    let as_json = cli.command.wants_json();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            return Failed::new("IO_ERROR", format!("cannot start threads: {error}"))
                .report(as_json);
        }
    };
    let outcome = runtime.block_on(run(cli));
    // Reads of standard input cannot be cancelled; nothing else is left by now.
    runtime.shutdown_background();
    match outcome {
        Ok(_) if commands::lost_output() => {
            Failed::new("IO_ERROR", "cannot write to standard output").report(false)
        }
        Ok(code) => code,
        Err(failed) => failed.report(as_json),
    }
}

async fn run(cli: Cli) -> Outcomes {
    telemetry::tell_panics_of_sled();
    telemetry::start("warn");
    match cli.command {
        Command::Serve(options) => serve(&options).await,
        Command::Worker(options) => Err(commands::worker(&options)),
        Command::Submit(options) => commands::submit(options).await,
        Command::Runs {
            connection,
            state,
            tag,
            limit,
        } => commands::runs(&connection, state.as_deref(), tag.as_deref(), limit).await,
        Command::Show {
            connection,
            run,
            events,
        } => commands::show(&connection, &run, events).await,
        Command::Result {
            connection,
            run,
            timeout,
        } => commands::result(&connection, &run, timeout).await,
        Command::Cancel {
            connection,
            run,
            reason,
        } => commands::cancel(&connection, &run, &reason).await,
        Command::Retry { connection, run } => commands::retry(&connection, &run).await,
        Command::Explain {
            connection,
            run,
            node,
            limit,
        } => commands::explain(&connection, &run, node, limit).await,
        Command::Verify { store, json, deep } => Ok(dagorama::verify::run(&store, json, deep)),
        Command::Config { json, what } => commands::config(&what, json),
        Command::Bench(options) => Ok(bench::run(options).await),
        Command::Demo(options) => Ok(demo::run(options).await),
        Command::Dlq { connection, what } => commands::dlq(&connection, &what).await,
        Command::Bridge { connection, what } => commands::bridge(&connection, &what).await,
        Command::Status { connection } => commands::status(&connection).await,
        Command::Version { json } => Ok(commands::version(json)),
    }
}

async fn serve(options: &dagorama::cli::Serve) -> Outcomes {
    let failed = |error: &server::ServeError| Failed::new(error.code(), chain(error));
    let config =
        server::configure(options).map_err(|error| Failed::new(error.code(), error.to_string()))?;
    let serving = server::start(config, options.ready_stdout)
        .await
        .map_err(|error| failed(&error))?;
    serving
        .until_stopped()
        .await
        .map_err(|error| failed(&error))?;
    Ok(ExitCode::SUCCESS)
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}
