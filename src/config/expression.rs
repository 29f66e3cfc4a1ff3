//! Paths into a message: `body.a.b[0]`, `key`, `header.x`, `'text'`, joined by `+`. Paths, not a language.
//!
//! This file only parses them; `bridges::arguments` reads messages with them.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One or more terms. A single term keeps the type of what it finds; several are joined as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expression {
    /// At least one.
    pub terms: Vec<Term>,
}

/// One term.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Term {
    /// `'text'`.
    Text(String),
    /// `body`, `body.a.b[0]`: into the decoded body.
    Body(Vec<Step>),
    /// `key`.
    Key,
    /// `header.x`.
    Header(String),
    /// `topic`, `partition`, `offset`, `path`, `line`: where the message stood.
    Coordinate(String),
}

/// One step into a decoded body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// `.name`.
    Field(String),
    /// `[0]`.
    Index(usize),
}

/// The words that name where a message stood.
pub const COORDINATES: &[&str] = &["topic", "partition", "offset", "path", "line"];

impl Expression {
    /// Whether it looks into the decoded body.
    #[must_use]
    pub fn reads_body(&self) -> bool {
        self.terms.iter().any(|term| matches!(term, Term::Body(_)))
    }
}

impl std::str::FromStr for Expression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let terms: Result<Vec<_>, _> = split(text)?.into_iter().map(term).collect();
        Ok(Self { terms: terms? })
    }
}

/// Cuts at every `+` outside quotes.
fn split(text: &str) -> Result<Vec<&str>, String> {
    let mut parts = Vec::new();
    let (mut start, mut quoted) = (0, false);
    for (at, c) in text.char_indices() {
        match c {
            '\'' => quoted = !quoted,
            '+' if !quoted => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted {
        return Err(format!(
            "{text} has a quote that does not end: write a text as 'text'"
        ));
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn term(text: &str) -> Result<Term, String> {
    let text = text.trim();
    if let Some(rest) = text.strip_prefix('\'') {
        return match rest.strip_suffix('\'') {
            Some(inner) if !inner.contains('\'') => Ok(Term::Text(inner.to_owned())),
            _ => Err(format!(
                "{text} is no text: write it as 'text', joined to paths by +"
            )),
        };
    }
    let (head, rest) = text.split_at(text.find(['.', '[']).unwrap_or(text.len()));
    match head {
        "body" => steps(text, rest).map(Term::Body),
        "key" if rest.is_empty() => Ok(Term::Key),
        "header" if rest.len() > 1 && rest.starts_with('.') => {
            Ok(Term::Header(rest[1..].to_owned()))
        }
        _ if rest.is_empty() && COORDINATES.contains(&head) => {
            Ok(Term::Coordinate(head.to_owned()))
        }
        _ => Err(format!(
            "\"{text}\" is no path: use body, body.a.b[0], key, header.NAME, {}, or a constant 'text', joined by +",
            COORDINATES.join(", ")
        )),
    }
}

fn steps(whole: &str, mut rest: &str) -> Result<Vec<Step>, String> {
    let refuse = || format!("\"{whole}\" is no path: write it like body.a.b[0]");
    let mut steps = Vec::new();
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix('[') {
            let end = inner.find(']').ok_or_else(refuse)?;
            steps.push(Step::Index(inner[..end].parse().map_err(|_| refuse())?));
            rest = &inner[end + 1..];
        } else {
            let name = rest.strip_prefix('.').ok_or_else(refuse)?;
            let end = name.find(['.', '[']).unwrap_or(name.len());
            if end == 0 {
                return Err(refuse());
            }
            steps.push(Step::Field(name[..end].to_owned()));
            rest = &name[end..];
        }
    }
    Ok(steps)
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, term) in self.terms.iter().enumerate() {
            if i > 0 {
                f.write_str(" + ")?;
            }
            match term {
                Term::Text(text) => write!(f, "'{text}'")?,
                Term::Key => f.write_str("key")?,
                Term::Header(name) => write!(f, "header.{name}")?,
                Term::Coordinate(name) => f.write_str(name)?,
                Term::Body(steps) => {
                    f.write_str("body")?;
                    for step in steps {
                        match step {
                            Step::Field(name) => write!(f, ".{name}")?,
                            Step::Index(index) => write!(f, "[{index}]")?,
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Expression {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl Serialize for Expression {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_and_shown() {
        for text in [
            "body",
            "body.a",
            "body.a.b[0]",
            "body[3][4].x",
            "key",
            "header.traceparent",
            "header.x.y",
            "topic",
            "offset",
            "'text'",
            "''",
            "'a + b' + key",
            "topic + '/' + partition + '/' + offset",
        ] {
            let expression: Expression = text.parse().unwrap();
            assert_eq!(expression.to_string(), text);
        }
        let two: Expression = "key+body.a".parse().unwrap();
        assert_eq!(
            two.terms,
            [Term::Key, Term::Body(vec![Step::Field("a".into())])]
        );
        assert!(two.reads_body());
        assert!(!"key".parse::<Expression>().unwrap().reads_body());
    }

    #[test]
    fn everything_else_is_refused_with_the_way_out() {
        for text in [
            "",
            "bodyx",
            "body.",
            "body..a",
            "body[",
            "body[x]",
            "body[-1]",
            "body[0]a",
            "key.a",
            "header",
            "header.",
            "keys",
            "'a",
            "'a'b'",
            "a b",
            "key +",
            "upper(key)",
        ] {
            let message = text.parse::<Expression>().unwrap_err();
            assert!(
                message.contains("write it")
                    || message.contains("use body")
                    || message.contains("write a text"),
                "{text}: {message}"
            );
        }
    }
}
