//! Replies, effects and everything that can be seen, against the oracle.

use super::*;

impl Schedule {
    pub(super) fn mutate(&mut self, command: &Command, reply: &mut Reply, facts: &mut Vec<Fact>) {
        match (self.mutant, command, reply) {
            (Mutant::SkippedFence, Command::Finish(_), Reply::Done(items)) => {
                for item in items {
                    if matches!(item, Err(no) if no.code == Code::LeaseExpired) {
                        self.figures.mutated = true;
                        *item = Ok(());
                    }
                }
            }
            (Mutant::DroppedOutboxRecord, _, _) if !self.figures.mutated => {
                if let Some(at) = facts
                    .iter()
                    .rposition(|fact| matches!(fact, Fact::Outbox { .. }))
                {
                    self.figures.mutated = true;
                    facts.remove(at);
                }
            }
            _ => {}
        }
    }

    /// Compares the replies with what the oracle would say; the oracle does the same on the way.
    pub(super) fn replies(&mut self, command: &Command, reply: &Reply) -> Result<(), String> {
        if let (Command::Submit(submissions), Reply::Submitted(items)) = (command, reply) {
            same(submissions.len(), items.len(), "replies")?;
            let mut stuck = BTreeSet::new();
            for (submission, item) in submissions.iter().zip(items) {
                let place = submission.origin.as_ref().and_then(|origin| {
                    let Identity::Position { partition, .. } = &origin.identity else {
                        return None;
                    };
                    Some((Arc::clone(&origin.route), Arc::clone(partition)))
                });
                if let Some(place) = place {
                    if stuck.contains(&place) {
                        same(
                            Some(Code::Overloaded),
                            item.as_ref().err().map(|no| no.code),
                            "behind a refused message",
                        )?;
                        continue;
                    }
                    if item.is_err() {
                        stuck.insert(place);
                    }
                }
                let given = item
                    .as_ref()
                    .ok()
                    .filter(|given| !given.existing)
                    .map(|given| given.run);
                let expected = self.oracle.submit(submission, given);
                let said = item
                    .as_ref()
                    .map(|given| given.existing)
                    .map_err(|no| no.code);
                let fits = match (&expected, said) {
                    (Expect::Yes, Ok(false)) | (Expect::Again, Ok(true)) => true,
                    (Expect::No(codes), Err(code)) => codes.contains(&code),
                    _ => false,
                };
                if !fits {
                    return Err(format!("{item:?} where {expected:?} was expected"));
                }
                self.figures.acked += u64::from(item.is_ok());
            }
            return Ok(());
        }
        let expected = self.oracle.command(command);
        let said: Vec<Result<(), Code>> = match reply {
            Reply::Done(items) => items
                .iter()
                .map(|item| item.clone().map_err(|no| no.code))
                .collect(),
            Reply::Created(item) => vec![item.as_ref().map(|_| ()).map_err(|no| no.code)],
            Reply::Attached(attached) => {
                let Command::Attach(attach) = command else {
                    return Err("attached?".to_owned());
                };
                let mut held = attached.leases.clone();
                held.sort();
                return same(held, self.oracle.held(attach.session), "held leases");
            }
            Reply::Submitted(_) => return Err("submitted?".to_owned()),
        };
        same(expected.len(), said.len(), "replies")?;
        for (i, (expected, said)) in expected.iter().zip(said).enumerate() {
            let fits = match (expected, said) {
                (Expect::Yes | Expect::Again, Ok(())) | (Expect::Nothing, _) => true,
                (Expect::No(codes), Err(code)) => codes.contains(&code),
                _ => false,
            };
            if !fits {
                return Err(format!(
                    "item {i}: {said:?} where {expected:?} was expected"
                ));
            }
            self.figures.acked += u64::from(said.is_ok());
            if said == Err(Code::LeaseExpired) {
                self.fault("late completion");
            }
        }
        Ok(())
    }

    /// Compares what is to be done with what the oracle has done.
    pub(super) fn effects(&mut self, tx: &Tx) -> Result<(), String> {
        let mut revoked = BTreeSet::new();
        let mut settled = BTreeSet::new();
        let mut ended = BTreeSet::new();
        let mut grown = BTreeSet::new();
        for effect in &tx.effects {
            let new = match effect {
                Effect::Lease(_) => true,
                Effect::Revoke {
                    session,
                    node,
                    attempt,
                } => revoked.insert((*session, *node, attempt.0)),
                Effect::RootSettled { run } => settled.insert(*run),
                Effect::RunEnded { run } => ended.insert(*run),
                Effect::OutboxGrew { output } => {
                    grown.insert(Arc::clone(output));
                    true
                }
            };
            if !new {
                return Err(format!("{effect:?} twice"));
            }
        }
        let deeds = &self.oracle.deeds;
        same(&revoked, &deeds.revoked, "revoked leases")?;
        same(&settled, &deeds.settled, "settled roots")?;
        same(&ended, &deeds.ended, "ended runs")?;
        let mut owed = BTreeSet::new();
        for fact in &tx.facts {
            if let Fact::Outbox {
                output,
                seq,
                node,
                round,
                ..
            } = fact
            {
                let name = self
                    .broker
                    .name(*output)
                    .ok_or("an output without a name")?;
                let outbox = self.oracle.outboxes.entry(Arc::clone(name)).or_default();
                outbox.next += 1;
                outbox.of.insert(*seq, *node);
                same(*seq, outbox.next, "number of the delivery")?;
                if !owed.insert((Arc::clone(name), *node, *round)) {
                    return Err(format!("I12: {node} is owed twice"));
                }
            }
        }
        same(&owed, &self.oracle.deeds.owed, "I12: owed deliveries")?;
        let outputs: BTreeSet<Arc<str>> = owed.into_iter().map(|(name, _, _)| name).collect();
        same(&grown, &outputs, "outputs that grew")
    }

    pub(super) fn turn(&self) -> Turn {
        Turn {
            now: Timestamp(self.now),
            wall: WallTime(self.wall),
            seed: 0,
        }
    }

    pub(super) fn ask(&mut self, query: &Query) -> Result<Answer, String> {
        if let Some(run) = self.broker.needs_query(query) {
            let facts = facts::run_facts(&self.facts, run);
            if !facts.is_empty() {
                self.broker
                    .adopt(run, facts)
                    .map_err(|error| error.detail)?;
            }
        }
        let answer = self.broker.query(self.turn(), query);
        self.broker.release_adopted();
        Ok(answer)
    }

    pub(super) fn compare_runs(
        &mut self,
        which: &dyn Fn(&crate::broker::tests::oracle::OracleRun) -> bool,
    ) -> Result<(), String> {
        for at in 0..self.oracle.runs.len() {
            let run = &self.oracle.runs[at];
            if run.deleted || !which(run) {
                continue;
            }
            let run = run.clone();
            let query = Query::Nodes {
                run: run.id,
                first: NodeIndex(0),
                limit: 10_000,
            };
            let Answer::Nodes(nodes) = self.ask(&query)? else {
                return Err(format!("I1: {} has no nodes", run.id));
            };
            same(nodes.len(), run.nodes.len(), "I1: number of nodes")?;
            for (i, (shown, node)) in nodes.iter().zip(&run.nodes).enumerate() {
                let states = self.oracle.states(at, i);
                if !states.contains(&shown.state) || shown.attempt.0 != node.attempt {
                    return Err(format!(
                        "{}/{i} is {shown:?}, not {states:?}: {node:?}",
                        run.id
                    ));
                }
            }
            let Answer::Run(summary) = self.ask(&Query::Run(run.id))? else {
                return Err(format!("I1: {} is unknown", run.id));
            };
            same(summary.state, self.oracle.run_state(at), "state of the run")?;
            same(summary.round, run.round, "round")?;
            let value = self.oracle.value_node(at, run.root as usize);
            same(summary.value_node.0 as usize, value, "node with the value")?;
            let roots = self.oracle.states(at, value);
            if !roots.contains(&summary.root_state) {
                return Err(format!(
                    "root of {} is {:?}, not {roots:?}",
                    run.id, summary.root_state
                ));
            }
            let mut counts = BTreeMap::new();
            for node in &nodes {
                *counts.entry(node.state).or_insert(0) += 1;
            }
            let shown: BTreeMap<_, _> =
                summary.counts.into_iter().filter(|(_, n)| *n > 0).collect();
            same(shown, counts, "I10: counts")?;
        }
        Ok(())
    }

    pub(super) fn compare_everything(&mut self) -> Result<(), String> {
        self.compare_runs(&|_| true)?;
        for (name, outbox) in self.oracle.outboxes.clone() {
            let answer = self.ask(&Query::Outbox { output: name })?;
            let cursor = outbox.cursor();
            let confirmed = outbox
                .confirmed
                .iter()
                .copied()
                .filter(|seq| *seq > cursor)
                .collect();
            same(
                answer,
                Answer::Outbox {
                    cursor,
                    next: outbox.next + 1,
                    confirmed,
                },
                "I13: outbox",
            )?;
        }
        for ((route, partition), next) in self.oracle.positions.clone() {
            let answer = self.ask(&Query::Position { route, partition })?;
            same(answer, Answer::Position(next), "I14: position")?;
        }
        Ok(())
    }

    pub(super) fn rebuilt(&mut self) -> Broker {
        let how = self.rng.below(3);
        facts::restore(
            &self.settings,
            &self.facts,
            how,
            Timestamp(self.now),
            facts::next_run(&self.facts),
        )
    }

    pub(super) fn compare_with_rebuilt(&mut self) -> Result<(), String> {
        let (now, wall) = (Timestamp(self.now), WallTime(self.wall));
        if facts::is_due(&self.broker, now, wall) {
            return Ok(());
        }
        let mut rebuilt = self.rebuilt();
        rebuilt.check_invariants();
        facts::learn_date(&mut rebuilt, now, wall);
        let (runs, restored) = (self.broker.fingerprint(), rebuilt.fingerprint());
        self.figures.checks += 1;
        if runs == restored {
            return Ok(());
        }
        Err(format!(
            "the rebuilt broker differs\n{}",
            facts::difference(&runs, &restored)
        ))
    }
}
