//! What comes in: submissions, inbound messages and where they stood, messages that died.
//!
//! A message's position or key is consumed by the commit of the run it starts (or of its dead letter), so it is applied once (G12).
//! Positions only grow, but for a wanted backward seek, which begins an epoch (I14).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::command::{
    Code, DeadLetter, Identity, NewNode, Origin, Rejection, Submission, Submitted,
};
use super::keys::ANY;
use super::node::{check_nodes, check_payload, create_nodes};
use super::outcome::{DeadLetterRecord, Fact, Tx};
use super::run::Run;
use super::types::{Codec, NameId, NodeIndex, RunId, RunRecord, RunSeq, RunState};
use super::{Broker, World, item};

/// Positions and dead letters of all routes.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Next position and epoch.
    pub positions: BTreeMap<(NameId, Arc<str>), (u32, u64)>,
    pub letters: BTreeMap<NameId, Letters>,
}

/// Dead letters of a route: their numbers.
#[derive(Debug, Default)]
pub(super) struct Letters {
    pub last: u64,
    pub kept: BTreeSet<u64>,
}

impl Inbox {
    pub(super) fn absorb_letter(&mut self, route: NameId, seq: u64, kept: bool) {
        let letters = self.letters.entry(route).or_default();
        letters.last = letters.last.max(seq);
        if kept {
            letters.kept.insert(seq);
        } else {
            letters.kept.remove(&seq);
        }
    }
}

/// The run of a repeated message, when it is not known any more.
const UNKNOWN_RUN: RunId = RunId {
    seq: RunSeq(0),
    salt: 0,
};

/// Route and partition of a message that has a position.
fn partition_of(origin: &Origin) -> Option<(Arc<str>, Arc<str>)> {
    match &origin.identity {
        Identity::Position { partition, .. } => {
            Some((Arc::clone(&origin.route), Arc::clone(partition)))
        }
        _ => None,
    }
}

fn existing(run: Option<RunId>) -> Submitted {
    Submitted {
        run: run.unwrap_or(UNKNOWN_RUN),
        existing: true,
    }
}

impl Broker {
    /// Submissions, in order. After a refused message those behind it in the same partition are refused too: taking one would move the
    /// position past the refused message, and a crash before it is offered again would lose it (G13).
    pub(super) fn on_submissions(
        &mut self,
        tx: &mut Tx,
        list: Vec<Submission>,
    ) -> Vec<Result<Submitted, Rejection>> {
        let mut stuck: Vec<(Arc<str>, Arc<str>)> = Vec::new();
        let mut replies = Vec::with_capacity(list.len());
        for submission in list {
            let place = submission.origin.as_ref().and_then(partition_of);
            let reply = match &place {
                Some(place) if stuck.contains(place) => Err(Rejection::new(
                    Code::Overloaded,
                    format!(
                        "a message before it in partition {:?} was refused: send it again with that one",
                        place.1
                    ),
                )),
                _ => item(tx, |tx| self.on_submit(tx, submission)),
            };
            if let (Err(_), Some(place)) = (&reply, place)
                && !stuck.contains(&place)
            {
                stuck.push(place);
            }
            replies.push(reply);
        }
        replies
    }

    fn on_submit(&mut self, tx: &mut Tx, submission: Submission) -> Result<Submitted, Rejection> {
        let world = &mut self.world;
        if let Some(origin) = &submission.origin
            && let Some(repeated) = world.check_origin(origin)?
        {
            return Ok(repeated);
        }
        if let Some(key) = submission.key
            && let Some(entry) = world.keys.get(key.hash)
        {
            if entry.is_expired() {
                let run = entry.run().unwrap_or(UNKNOWN_RUN);
                return Err(Rejection::new(
                    Code::RunExpired,
                    format!(
                        "the key belongs to run {run}, which retention has deleted: use another key"
                    ),
                ));
            }
            if !entry.is_of(key.content) {
                return Err(Rejection::new(
                    Code::SubmissionConflict,
                    "the key was used with other content: use another key",
                ));
            }
            let run = entry.run();
            if let Some(origin) = &submission.origin {
                world.consume(tx, origin, run);
            }
            return Ok(existing(run));
        }
        world.check_submission(&submission)?;

        let seq = RunSeq(world.next_run);
        world.next_run += 1;
        let record = RunRecord {
            salt: xxh3_64_with_seed(&seq.0.to_le_bytes(), world.seed),
            root: NodeIndex(submission.root),
            round: 1,
            cancelled: false,
            cancel_reason: Arc::clone(&world.nothing),
            tags: submission.tags,
            source: submission
                .origin
                .as_ref()
                .map_or_else(|| Arc::clone(&world.native), |o| Arc::clone(&o.route)),
            created: world.now,
            created_wall: world.wall,
            ended: None,
            state: RunState::Running,
            key: submission.key.map(|key| key.hash),
            n_nodes: 0,
            n_events: 0,
        };
        let mut run = Box::new(Run::new(seq, record.clone()));
        run.write_run(tx, record);
        create_nodes(
            &mut run,
            world,
            tx,
            None,
            &submission.specs,
            submission.nodes,
        );
        let id = run.id();
        self.runs.insert(seq, run);
        if let Some(key) = submission.key {
            world.take_key(tx, key.hash, Some(id), key.content);
        }
        if let Some(origin) = &submission.origin {
            world.consume(tx, origin, Some(id));
        }
        Ok(Submitted {
            run: id,
            existing: false,
        })
    }
}

impl World {
    /// Looks where a message stood: `Some` if it is a repetition.
    fn check_origin(&self, origin: &Origin) -> Result<Option<Submitted>, Rejection> {
        match &origin.identity {
            Identity::Position {
                partition,
                position,
                next,
            } => {
                if next <= position {
                    return Err(Rejection::new(
                        Code::InvalidRequest,
                        format!("a message at {position} cannot end at {next}"),
                    ));
                }
                let done = *position < self.next_position(&origin.route, partition);
                Ok(done.then(|| existing(None)))
            }
            Identity::Key(key) => Ok(self.keys.get(*key).map(|entry| existing(entry.run()))),
            Identity::DeadLetter { seq } => self.check_letter(&origin.route, *seq).map(|_| None),
            Identity::None => Ok(None),
        }
    }

    /// The message has been applied, or has died: it will not be again.
    fn consume(&mut self, tx: &mut Tx, origin: &Origin, run: Option<RunId>) {
        match &origin.identity {
            Identity::Position {
                partition, next, ..
            } => {
                let route = self.intern_name(tx, &origin.route);
                let at = (route, Arc::clone(partition));
                let epoch = self.inbox.positions.get(&at).map_or(0, |(epoch, _)| *epoch);
                self.put(
                    tx,
                    Fact::Position {
                        route,
                        partition: at.1,
                        epoch,
                        next: *next,
                    },
                );
            }
            Identity::Key(key) => self.take_key(tx, *key, run, ANY),
            Identity::DeadLetter { seq } => {
                let route = self.intern_name(tx, &origin.route);
                self.put(tx, Fact::DeadLetterRemoved { route, seq: *seq });
            }
            Identity::None => {}
        }
    }

    fn check_submission(&self, submission: &Submission) -> Result<(), Rejection> {
        let n = submission.nodes.len();
        if n == 0 || submission.root as usize >= n {
            return Err(Rejection::new(
                Code::InvalidRequest,
                format!(
                    "the root is node {} of {n}: name one that is sent",
                    submission.root
                ),
            ));
        }
        let is_pickle = |node: &NewNode| node.arguments.codec == Codec::Pickle;
        if submission.origin.is_some() && submission.nodes.iter().any(is_pickle) {
            return Err(Rejection::new(
                Code::CodecRefused,
                "a bridge may not send pickles: they run code where they are read",
            ));
        }
        self.check_outbox()?;
        let open = self.open_nodes + n as u64;
        if open > self.settings.max_open_nodes {
            return Err(Rejection::new(
                Code::QuotaPending,
                format!(
                    "{open} nodes would be open, the limit is {}: submit again when some have ended",
                    self.settings.max_open_nodes
                ),
            ));
        }
        let by_key = |origin: &Origin| matches!(origin.identity, Identity::Key(_));
        let keys = usize::from(submission.key.is_some())
            + usize::from(submission.origin.as_ref().is_some_and(by_key));
        self.check_room_for_keys(keys)?;
        check_nodes(self, &submission.specs, &submission.nodes, None)
    }

    pub(super) fn on_dead_letter(
        &mut self,
        tx: &mut Tx,
        letter: DeadLetter,
    ) -> Result<(), Rejection> {
        if self.check_origin(&letter.origin)?.is_some() {
            return Ok(());
        }
        check_payload(&letter.body)?;
        let by_key = matches!(letter.origin.identity, Identity::Key(_));
        self.check_room_for_keys(usize::from(by_key))?;
        let route = self.intern_name(tx, &letter.origin.route);
        let seq = self.inbox.letters.get(&route).map_or(0, |kept| kept.last) + 1;
        let record = DeadLetterRecord {
            code: letter.code,
            reason: letter.reason,
            attempts: letter.attempts,
            coordinates: letter.coordinates,
            body: letter.body,
            at: self.now,
        };
        self.put(
            tx,
            Fact::DeadLetter {
                route,
                seq,
                letter: Box::new(record),
            },
        );
        self.consume(tx, &letter.origin, None);
        Ok(())
    }

    pub(super) fn on_drop_dead_letter(
        &mut self,
        tx: &mut Tx,
        route: &str,
        seq: u64,
    ) -> Result<(), Rejection> {
        let route = self.check_letter(route, seq)?;
        self.put(tx, Fact::DeadLetterRemoved { route, seq });
        Ok(())
    }

    fn check_letter(&self, route: &str, seq: u64) -> Result<NameId, Rejection> {
        self.names
            .find(route)
            .filter(|id| {
                self.inbox
                    .letters
                    .get(id)
                    .is_some_and(|letters| letters.kept.contains(&seq))
            })
            .ok_or_else(|| {
                Rejection::new(
                    Code::UnknownName,
                    format!("route {route:?} has no dead letter {seq}"),
                )
            })
    }

    pub(super) fn on_seek_inbox(
        &mut self,
        tx: &mut Tx,
        route: &Arc<str>,
        partition: Arc<str>,
        next: u64,
    ) {
        let route = self.intern_name(tx, route);
        let at = (route, partition);
        let epoch = self.inbox.positions.get(&at).map_or(0, |(epoch, _)| *epoch);
        self.put(
            tx,
            Fact::Position {
                route,
                partition: at.1,
                epoch: epoch.saturating_add(1),
                next,
            },
        );
    }

    /// The next position to be applied; 0 if nothing was yet.
    pub(super) fn next_position(&self, route: &str, partition: &Arc<str>) -> u64 {
        self.names
            .find(route)
            .and_then(|route| self.inbox.positions.get(&(route, Arc::clone(partition))))
            .map_or(0, |(_, next)| *next)
    }
}
