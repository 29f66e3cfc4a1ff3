//! SIGKILL in the middle of writing, again and again: each line once, none lost, whatever the instant.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use dagorama_bridge_api::{Delivery, Sink as _};
use dagorama_bridge_file::FileSink;

const DIR: &str = "DAGORAMA_TEST_KILL_DIR";

fn delivery(seq: u64) -> Delivery {
    // Of many lengths, so that writes end anywhere in a block.
    let padding = "x".repeat((seq * 37 % 900) as usize);
    Delivery {
        seq,
        message_id: format!("1-00000000000000aa/{seq}/1/out"),
        key: None,
        body: Some(format!("{{\"n\":{seq},\"p\":\"{padding}\"}}").into()),
        content_type: "application/json",
        headers: Vec::new(),
    }
}

/// The child: delivers batches from the first that its parent has not committed, and says what was confirmed.
#[tokio::test]
async fn child() {
    let Some(dir) = std::env::var_os(DIR) else {
        return;
    };
    let dir = Path::new(&dir);
    let mut next: u64 =
        fs::read_to_string(dir.join("committed")).map_or(1, |text| text.parse().unwrap());
    let mut sink = FileSink::open(dir.join("out")).await.unwrap();
    let mut out = std::io::stdout();
    for round in 0.. {
        let count = 1 + next * 7 % 40;
        let confirmed = sink
            .deliver((next..next + count).map(delivery).collect())
            .await
            .unwrap();
        assert_eq!(confirmed.len() as u64, count);
        next += count;
        // The broker's commit takes its time: many kills fall between the write and what is known of it.
        std::thread::sleep(Duration::from_micros(next * 131 % 1500));
        writeln!(out, "confirmed {next}").unwrap();
        out.flush().unwrap();
        if round % 5 == 4 {
            sink.drain().await.unwrap();
        }
    }
}

#[test]
fn each_line_once_over_thirty_kills_or_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut redelivered = 0;
    let mut next = 1u64;
    for round in 0..200u64 {
        if round >= 30 && redelivered >= 5 {
            break;
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut confirmed = next;
        let mut wait = 3 + round % 4;
        for line in lines.by_ref() {
            let line = line.unwrap();
            let Some(n) = line.split("confirmed ").nth(1) else {
                continue;
            };
            confirmed = n.parse().unwrap();
            wait -= 1;
            if wait == 0 {
                break;
            }
        }
        assert_eq!(wait, 0, "the child died by itself in round {round}");
        std::thread::sleep(Duration::from_micros(round * 613 % 4000));
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines {
            if let Some(n) = line
                .unwrap()
                .split("confirmed ")
                .nth(1)
                .and_then(|n| n.parse().ok())
            {
                confirmed = n;
            }
        }
        // The broker had committed all of that, or all but the last batch.
        let whole = fs::read_to_string(dir.path().join("out"))
            .unwrap()
            .lines()
            .count() as u64;
        assert!(
            whole + 1 >= confirmed,
            "confirmed up to {confirmed}, {whole} lines are there"
        );
        next = confirmed;
        redelivered += u64::from(whole + 1 > confirmed);
        fs::write(dir.path().join("committed"), next.to_string()).unwrap();
    }
    // One more start finishes what the last kill left.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut sink = FileSink::open(dir.path().join("out")).await.unwrap();
        let lines = fs::read_to_string(dir.path().join("out"))
            .unwrap()
            .lines()
            .count() as u64;
        let rest = (next..=lines.max(next)).map(delivery).collect();
        sink.deliver(rest).await.unwrap();
    });
    let text = fs::read_to_string(dir.path().join("out")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    for (i, line) in lines.iter().enumerate() {
        let wanted = delivery(i as u64 + 1).body.unwrap();
        assert_eq!(line.as_bytes(), &wanted[..], "line {}", i + 1);
    }
    assert!(lines.len() > 300, "{} lines", lines.len());
    assert!(
        redelivered >= 5,
        "too few kills fell between writing and confirming: {redelivered}"
    );
}
