//! The commands about bridges: routes, outputs, and the messages that could not be used.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::{Outcomes, connect, say, text};
use crate::cli::{BridgeCommand, Connection, DlqCommand};

/// `dlq`.
pub async fn dlq(connection: &Connection, what: &DlqCommand) -> Outcomes {
    let request = match what {
        DlqCommand::List { route, limit } => json!({"do": "list", "route": route, "limit": limit}),
        DlqCommand::Show { route, seq } => json!({"do": "show", "route": route, "seq": seq}),
        DlqCommand::Replay { route, seq } => json!({"do": "replay", "route": route, "seq": seq}),
        DlqCommand::Drop { route, seq } => json!({"do": "drop", "route": route, "seq": seq}),
    };
    let answer = connect(connection).await?.dlq(&request).await?;
    if connection.json {
        // The broker says nothing when it has dropped one; a program wants to see which.
        say(match what {
            DlqCommand::Drop { route, seq } => json!({"dropped": {"route": route, "seq": seq}}),
            _ => answer,
        });
        return Ok(ExitCode::SUCCESS);
    }
    match what {
        DlqCommand::List { .. } => list(&answer),
        DlqCommand::Show { .. } => {
            say(letter_line(&answer));
            let body = answer["body"].as_str().map(str::to_owned);
            say(body.unwrap_or_else(|| format!("bytes in hex: {}", text(&answer["body"]["hex"]))));
        }
        DlqCommand::Replay { route, seq } => say(format_args!(
            "replayed {route}/{seq}: it is run {}",
            text(&answer["run"])
        )),
        DlqCommand::Drop { route, seq } => say(format_args!("dropped {route}/{seq}")),
    }
    Ok(ExitCode::SUCCESS)
}

fn list(answer: &Value) {
    let letters = answer["letters"].as_array().cloned().unwrap_or_default();
    for letter in &letters {
        say(letter_line(letter));
    }
    match letters.first() {
        None => say("no dead letters"),
        Some(letter) => say(format_args!(
            "`dagorama dlq show --route {} {}` shows the message; `dlq replay` tries it again, `dlq drop` throws it away",
            text(&letter["route"]),
            text(&letter["seq"])
        )),
    }
}

fn letter_line(letter: &Value) -> String {
    let coordinates: Vec<String> = letter["coordinates"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| format!("{name} {}", text(value)))
        .collect();
    let place = if coordinates.is_empty() {
        String::new()
    } else {
        format!("  ({})", coordinates.join(", "))
    };
    format!(
        "{}/{}  {}  {}{place}",
        text(&letter["route"]),
        text(&letter["seq"]),
        text(&letter["code"]),
        text(&letter["reason"])
    )
}

/// `bridge`.
pub async fn bridge(connection: &Connection, what: &BridgeCommand) -> Outcomes {
    let BridgeCommand::List = what;
    let answer = connect(connection).await?.bridges().await?;
    if connection.json {
        say(&answer);
        return Ok(ExitCode::SUCCESS);
    }
    let mut none = true;
    for (kind, list) in [("route", &answer["routes"]), ("output", &answer["outputs"])] {
        for entry in list.as_array().into_iter().flatten() {
            none = false;
            say(entry_line(kind, entry));
        }
    }
    if none {
        say("no routes and no outputs: config/sidecar-file.toml is an example with both");
    }
    Ok(ExitCode::SUCCESS)
}

fn entry_line(kind: &str, entry: &Value) -> String {
    let mut parts = vec![counted(entry["messages"].as_u64().unwrap_or(0), "message")];
    parts.extend(entry["lag"].as_u64().map(|lag| format!("lag {lag}")));
    parts.extend(
        entry["dead_letters"]
            .as_u64()
            .filter(|n| *n > 0)
            .map(|n| counted(n, "dead letter")),
    );
    let said = |field: &str| entry[field].as_str().filter(|text| !text.is_empty());
    let reason = said("reason").map(|reason| match said("code") {
        Some(code) => format!("  {code}: {reason}"),
        None => format!("  {reason}"),
    });
    let error = said("last_error")
        .filter(|error| Some(*error) != said("reason"))
        .map(|error| format!("  last error: {error}"));
    format!(
        "{kind} {}  {}  {}{}{}",
        text(&entry["name"]),
        text(&entry["state"]),
        parts.join(", "),
        reason.unwrap_or_default(),
        error.unwrap_or_default()
    )
}

fn counted(n: u64, what: &str) -> String {
    let end = if n == 1 { "" } else { "s" };
    format!("{n} {what}{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_for_people() {
        let letter = json!({"route": "inbox", "seq": 3, "code": "BODY_NOT_JSON", "reason": "no JSON", "coordinates": {"offset": "12", "path": "a"}});
        assert_eq!(
            letter_line(&letter),
            "inbox/3  BODY_NOT_JSON  no JSON  (offset 12, path a)"
        );
        let fine = json!({"name": "inbox", "state": "running", "code": "", "reason": "", "last_error": "", "messages": 4, "dead_letters": 1, "lag": 0});
        assert_eq!(
            entry_line("route", &fine),
            "route inbox  running  4 messages, lag 0, 1 dead letter"
        );
        let parked = json!({"name": "out", "state": "parked", "code": "OUTPUT_FAILED", "reason": "no space", "last_error": "no space", "messages": 0, "lag": null});
        assert_eq!(
            entry_line("output", &parked),
            "output out  parked  0 messages  OUTPUT_FAILED: no space"
        );
    }
}
