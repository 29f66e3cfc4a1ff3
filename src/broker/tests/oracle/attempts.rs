//! What ends attempts and runs, and what follows from it.

use super::*;

impl Oracle {
    /// Whether the lease holds; else what is said. `None`: it does.
    pub(super) fn fenced(
        &self,
        key: NodeKey,
        attempt: u32,
        real: bool,
        digest: Option<u64>,
    ) -> Option<Expect> {
        let node = self
            .run(key.run)
            .and_then(|run| self.runs[run].nodes.get(key.node.0 as usize));
        let Some(node) = node.filter(|node| real && attempt >= 1 && attempt <= node.attempt) else {
            return Some(Expect::No(&[Code::LeaseUnknown]));
        };
        let run = &self.runs[self.run(key.run).expect("just found")];
        if attempt == node.attempt {
            if let (Some(accepted), Some(digest)) = (node.digest, digest) {
                return Some(match accepted == digest {
                    true => Expect::Again,
                    false if node.released => Expect::No(&[
                        Code::LeaseExpired,
                        Code::CompletionConflict,
                        Code::LeaseRevoked,
                    ]),
                    false => Expect::No(&[Code::CompletionConflict]),
                });
            }
            if matches!(node.stage, Stage::Leased(_)) && !run.cancelled {
                return None;
            }
        }
        Some(match (run.cancelled, run.round) {
            (false, 1) => Expect::No(&[Code::LeaseExpired]),
            (true, _) if attempt == node.attempt && matches!(node.stage, Stage::Leased(_)) => {
                Expect::No(&[Code::LeaseRevoked])
            }
            // Lapsed and cancelled, or of an earlier round: both are true.
            _ => Expect::No(&[Code::LeaseExpired, Code::LeaseRevoked]),
        })
    }

    pub(super) fn finish(&mut self, item: &Completion) -> Expect {
        let real = item.token != crate::broker::tests::schedule::FORGED;
        if let Some(answer) = self.fenced(item.node, item.attempt.0, real, Some(item.digest)) {
            return answer;
        }
        let run = self.run(item.node.run).expect("fenced");
        let at = item.node.node.0 as usize;
        let now = self.now;
        let retry = self.retry_of(run, at);
        let stays = matches!(item.end, AttemptEnd::Failed { .. } | AttemptEnd::Released);
        if !stays {
            if item
                .children
                .iter()
                .enumerate()
                .any(|(i, node)| bad_inputs(node, i))
            {
                return Expect::No(&[Code::GraphCycle]);
            }
            if self.bad_references(run, at, item) {
                return Expect::No(&[Code::GraphCycle]);
            }
            self.add(run, Some(at), &item.children, &item.specs);
        }
        let base =
            (self.runs[run].nodes.len() - if stays { 0 } else { item.children.len() }) as u32;
        let node = &mut self.runs[run].nodes[at];
        node.digest = Some(item.digest);
        node.released = false;
        match &item.end {
            AttemptEnd::Value(_) => node.stage = Stage::Succeeded,
            AttemptEnd::Structure { references, .. } => {
                node.stage = Stage::Settling;
                node.references = references
                    .iter()
                    .flat_map(|input| each(input, base))
                    .collect();
            }
            AttemptEnd::Tail(to) => {
                node.stage = Stage::Settling;
                let one = NewInput {
                    first: *to,
                    count: 1,
                    mode: InputUse::Value,
                };
                node.references = each(&one, base).collect();
                node.tail = true;
            }
            AttemptEnd::Failed { retryable, .. } => {
                node.failures += 1;
                if *retryable && node.failures < retry.max_attempts {
                    let mut delay = retry.delay_ms;
                    for _ in 1..node.failures {
                        delay = delay * u64::from(retry.factor_milli) / 1_000;
                    }
                    node.stage = Stage::Backoff;
                    node.not_before = now + delay.min(retry.max_delay_ms);
                } else {
                    node.stage = Stage::Failed;
                }
            }
            AttemptEnd::Released => {
                node.stage = Stage::Open;
                node.released = true;
            }
        }
        self.outcomes += 1;
        if self.runs[run].nodes[at].stage.terminal() {
            self.owe(run, at);
        }
        self.settle(run);
        Expect::Yes
    }

    /// What already exists may be waited for if it is an own child or has a value: nothing else stays as it is for ever.
    fn bad_existing<'a>(
        &self,
        run: usize,
        at: usize,
        mut inputs: impl Iterator<Item = &'a NewInput>,
    ) -> bool {
        let run = &self.runs[run];
        inputs.any(|input| {
            matches!(input.first, NodeRef::Existing(_))
                && each(input, 0).any(|to| {
                    let succeeded = run.nodes[to as usize].stage == Stage::Succeeded;
                    !succeeded && !run.nodes[at].children.contains(&to)
                })
        })
    }

    /// The same of all that comes with a completion.
    fn bad_references(&self, run: usize, at: usize, item: &Completion) -> bool {
        let references: Vec<NewInput> = match &item.end {
            AttemptEnd::Structure { references, .. } => references.clone(),
            AttemptEnd::Tail(first) => {
                vec![NewInput {
                    first: *first,
                    count: 1,
                    mode: InputUse::Value,
                }]
            }
            _ => Vec::new(),
        };
        let inputs = item.children.iter().flat_map(|child| &child.inputs);
        self.bad_existing(run, at, references.iter().chain(inputs))
    }

    pub(super) fn create(&mut self, request: &CreateChildren) -> Expect {
        let real = request.token != crate::broker::tests::schedule::FORGED;
        if let Some(answer) = self.fenced(request.node, request.attempt.0, real, None) {
            return answer;
        }
        let run = self.run(request.node.run).expect("fenced");
        let at = request.node.node.0 as usize;
        let existing = self.runs[run].nodes[at].children.len();
        let first = request.first_child as usize;
        if first > existing {
            return Expect::No(&[Code::InvalidRequest]);
        }
        // The schedules repeat a creation exactly, or append.
        if first < existing {
            return Expect::Again;
        }
        let inputs = request.children.iter().flat_map(|child| &child.inputs);
        if self.bad_existing(run, at, inputs) {
            return Expect::No(&[Code::GraphCycle]);
        }
        self.add(run, Some(at), &request.children, &request.specs);
        self.settle(run);
        Expect::Yes
    }

    pub(super) fn cancel(&mut self, id: RunId) -> Expect {
        let Some(at) = self.run(id.seq).filter(|at| self.runs[*at].id == id) else {
            return Expect::No(&[Code::UnknownRun]);
        };
        if self.runs[at].ended {
            return Expect::Again;
        }
        for i in 0..self.runs[at].nodes.len() {
            let node = &self.runs[at].nodes[i];
            if let Stage::Leased(session) = node.stage
                && self.is_attached(session)
            {
                let key = NodeKey::new(id.seq, NodeIndex(i as u32));
                self.deeds.revoked.insert((session, key, node.attempt));
            }
        }
        self.runs[at].cancelled = true;
        self.settle(at);
        self.forget_idle_sessions();
        Expect::Yes
    }

    pub(super) fn resume(&mut self, id: RunId) -> Expect {
        let Some(at) = self.run(id.seq).filter(|at| self.runs[*at].id == id) else {
            return Expect::No(&[Code::UnknownRun]);
        };
        let run = &mut self.runs[at];
        if !run.ended {
            return Expect::No(&[Code::RunNotEnded]);
        }
        if run.nodes.iter().all(|node| node.stage == Stage::Succeeded) {
            return Expect::Again;
        }
        run.round += 1;
        run.cancelled = false;
        run.ended = false;
        run.root_told = run.nodes[run.root as usize].stage == Stage::Succeeded;
        let (now, wall) = (self.now, self.wall);
        for node in &mut run.nodes {
            if node.stage == Stage::Succeeded {
                continue;
            }
            node.failures = 0;
            node.losses = 0;
            if !node.references.is_empty() {
                // Its body ended well: it waits again for what it refers to.
                node.stage = Stage::Settling;
                continue;
            }
            // A delay that a cancelled node was still waiting for goes on; nothing else does.
            if node.stage != Stage::Open {
                node.not_before = 0;
                node.not_before_wall = WallTime(0);
            }
            node.stage = Stage::Open;
            node.ready_since = None;
            // Resuming takes the newest code.
            if let Some(newest) = self.announced.get(&node.spec.action)
                && !node.spec.by_name
            {
                let fingerprint = newest.fingerprint.clone();
                node.spec = Arc::new(Spec {
                    fingerprint,
                    ..Spec::clone(&node.spec)
                });
            }
            node.woken = node.not_before <= now && node.not_before_wall <= wall;
        }
        self.settle(at);
        Expect::Yes
    }

    pub(super) fn expire(&mut self, seq: RunSeq) -> Expect {
        let Some(at) = self.run(seq) else {
            return Expect::Nothing;
        };
        let pending = self.outboxes.values().any(|outbox| {
            outbox
                .of
                .iter()
                .any(|(seq_no, node)| node.run == seq && !outbox.confirmed.contains(seq_no))
        });
        if !self.runs[at].ended || pending {
            return Expect::Nothing;
        }
        self.runs[at].deleted = true;
        Expect::Yes
    }

    /// Delays and backoffs end with the first command after their time.
    pub(super) fn wake(&mut self) {
        let (now, wall) = (self.now, self.wall);
        for at in 0..self.runs.len() {
            let run = &mut self.runs[at];
            if run.ended {
                continue;
            }
            for node in &mut run.nodes {
                if node.stage == Stage::Backoff && node.not_before <= now && !run.cancelled {
                    node.stage = Stage::Open;
                }
                node.woken |= node.not_before <= now && node.not_before_wall <= wall;
            }
            self.settle(at);
        }
    }

    /// Leases lapse with a tick, so that what has arrived before counts.
    pub(super) fn tick(&mut self) {
        let lapsed: Vec<SessionId> = self
            .sessions
            .iter()
            .filter(|session| {
                let silent = session.last_seen + self.settings.lease_ms;
                let grace = session
                    .detached
                    .map_or(u64::MAX, |at| at + self.settings.detach_grace_ms);
                silent.min(grace) <= self.now
            })
            .map(|session| session.id)
            .collect();
        for session in lapsed {
            let attached = self.is_attached(session);
            for (run, at) in self.leases_of(session) {
                let key = NodeKey::new(self.runs[run].id.seq, NodeIndex(at as u32));
                let most = self.retry_of(run, at).max_losses;
                let node = &mut self.runs[run].nodes[at];
                if attached {
                    self.deeds.revoked.insert((session, key, node.attempt));
                }
                node.losses += 1;
                let lost = node.losses >= most;
                node.stage = if lost { Stage::Failed } else { Stage::Open };
                if lost {
                    self.owe(run, at);
                }
            }
        }
        for run in 0..self.runs.len() {
            if !self.runs[run].ended {
                self.settle(run);
            }
        }
        self.forget_idle_sessions();
    }

    /// A session that is not attached exists by its leases only.
    pub(super) fn forget_idle_sessions(&mut self) {
        let held: Vec<SessionId> = self.sessions.iter().map(|session| session.id).collect();
        let held: Vec<bool> = held
            .into_iter()
            .map(|id| !self.leases_of(id).is_empty())
            .collect();
        let mut held = held.into_iter();
        self.sessions
            .retain(|session| held.next().expect("one each") || session.attached);
    }

    /// After a restart sessions are known by their leases, which get a whole period; nobody is attached.
    pub(in crate::broker::tests) fn restart(&mut self) {
        for session in &mut self.sessions {
            session.attached = false;
            session.credit = 0;
            session.last_seen = self.now;
            session.detached = None;
        }
        self.forget_idle_sessions();
    }

    pub(super) fn leases_of(&self, id: SessionId) -> Vec<(usize, usize)> {
        let mut leases = Vec::new();
        for (r, run) in self.runs.iter().enumerate() {
            for (n, node) in run.nodes.iter().enumerate() {
                if node.stage == Stage::Leased(id) && !run.cancelled {
                    leases.push((r, n));
                }
            }
        }
        leases
    }

    /// A node's outcome is final in this round: outputs that match are owed a delivery.
    pub(super) fn owe(&mut self, run: usize, at: usize) {
        let run = &self.runs[run];
        let node = &run.nodes[at];
        let action = self
            .resolved(&node.spec)
            .map_or(&node.spec.action, |spec| &spec.action)
            .clone();
        for rule in &self.settings.outputs {
            let wanted = if node.stage == Stage::Succeeded {
                rule.succeeded
            } else {
                rule.failed
            };
            if wanted && matches(rule, &action) {
                let key = NodeKey::new(run.id.seq, NodeIndex(at as u32));
                self.deeds
                    .owed
                    .insert((Arc::clone(&rule.name), key, run.round));
            }
        }
    }

    /// Skips, settles and ends whatever follows, by looking at everything until nothing changes.
    pub(super) fn settle(&mut self, at: usize) {
        while !self.runs[at].cancelled
            && let Some((node, stage)) = self.next_settled(at)
        {
            self.runs[at].nodes[node].stage = stage;
            self.owe(at, node);
        }
        let now = self.now;
        for node in 0..self.runs[at].nodes.len() {
            let ready = self.is_ready(at, node);
            let since = &mut self.runs[at].nodes[node].ready_since;
            *since = if ready { since.or(Some(now)) } else { None };
        }
        let run = &mut self.runs[at];
        let seq = run.id.seq;
        if !run.root_told && (run.cancelled || run.nodes[run.root as usize].stage.terminal()) {
            run.root_told = true;
            self.deeds.settled.insert(seq);
        }
        if !run.ended && (run.cancelled || run.nodes.iter().all(|node| node.stage.terminal())) {
            run.ended = true;
            self.deeds.ended.insert(seq);
        }
    }

    pub(super) fn next_settled(&self, run: usize) -> Option<(usize, Stage)> {
        let nodes = &self.runs[run].nodes;
        let bad = |at: u32| matches!(nodes[at as usize].stage, Stage::Failed | Stage::Skipped);
        nodes.iter().enumerate().find_map(|(i, node)| {
            let stage = match node.stage {
                Stage::Open
                    if node
                        .inputs
                        .iter()
                        .any(|(at, mode)| *mode != InputUse::Outcome && bad(*at)) =>
                {
                    Stage::Skipped
                }
                // A tail call has the state of the node it handed over to.
                Stage::Settling
                    if node.tail && nodes[node.references[0] as usize].stage.terminal() =>
                {
                    nodes[node.references[0] as usize].stage
                }
                Stage::Settling if node.references.iter().any(|at| bad(*at)) => Stage::Failed,
                Stage::Settling
                    if node
                        .references
                        .iter()
                        .all(|at| nodes[*at as usize].stage == Stage::Succeeded) =>
                {
                    Stage::Succeeded
                }
                _ => return None,
            };
            Some((i, stage))
        })
    }
}
