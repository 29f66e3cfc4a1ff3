//! Which nodes are ready, who may be given them in which order, and what users may see.

use super::*;

impl Oracle {
    /// The policy of a node started by name is that of the action as announced last.
    pub(super) fn retry_of(&self, run: usize, at: usize) -> Retry {
        let spec = &self.runs[run].nodes[at].spec;
        self.resolved(spec)
            .map(|spec| spec.retry)
            .unwrap_or_default()
    }

    /// Whether there is a connection on which a session could be told something.
    pub(super) fn is_attached(&self, id: SessionId) -> bool {
        self.sessions
            .iter()
            .any(|session| session.id == id && session.attached)
    }

    /// Waits for nothing: I6.
    pub(super) fn has_inputs(&self, run: usize, node: usize) -> bool {
        let nodes = &self.runs[run].nodes;
        nodes[node].inputs.iter().all(|(at, mode)| {
            let stage = nodes[*at as usize].stage;
            stage == Stage::Succeeded || (*mode == InputUse::Outcome && stage.terminal())
        })
    }

    pub(super) fn is_ready(&self, run: usize, at: usize) -> bool {
        let node = &self.runs[run].nodes[at];
        node.stage == Stage::Open
            && node.woken
            && !self.runs[run].cancelled
            && !self.runs[run].ended
            && self.has_inputs(run, at)
    }

    /// Its delay is over, but no tick has come to see it: it may be offered or not.
    pub(super) fn may_be_ready(&self, run: usize, at: usize) -> bool {
        let node = &self.runs[run].nodes[at];
        self.is_ready(run, at)
            || (node.stage == Stage::Open
                && node.not_before <= self.now
                && node.not_before_wall <= self.wall
                && !self.runs[run].cancelled
                && !self.runs[run].ended
                && self.has_inputs(run, at))
    }

    pub(super) fn resolved<'a>(&'a self, spec: &'a Arc<Spec>) -> Option<&'a Arc<Spec>> {
        if spec.by_name {
            self.announced.get(&spec.action)
        } else {
            Some(spec)
        }
    }

    pub(super) fn serves(session: &OracleSession, spec: &Spec) -> bool {
        session.attached
            && session.queues.contains(&spec.queue)
            && spec
                .taint
                .as_ref()
                .is_none_or(|taint| session.tolerations.contains(taint))
            && session.actions.iter().any(|has| {
                has.action == spec.action && (!spec.pin_code || has.fingerprint == spec.fingerprint)
            })
    }

    pub(super) fn silent(&self, session: &OracleSession) -> bool {
        self.now >= session.last_seen + self.settings.lease_ms
    }

    /// Order in which nodes are offered: priority, then the older run, then the order of creation.
    pub(super) fn rank(&self, run: usize, at: usize) -> (i32, RunSeq, usize) {
        let spec = &self.runs[run].nodes[at].spec;
        let priority = self.resolved(spec).map_or(0, |spec| spec.priority);
        (-priority, self.runs[run].id.seq, at)
    }

    /// Checks the leases that a command gave, in their order, and does them.
    pub(in crate::broker::tests) fn leases(
        &mut self,
        effects: &[Effect],
        in_order: bool,
    ) -> Result<(), String> {
        let leases: Vec<&Lease> = effects
            .iter()
            .filter_map(|effect| {
                if let Effect::Lease(lease) = effect {
                    Some(lease)
                } else {
                    None
                }
            })
            .collect();
        for bundle in leases.chunk_by(|a, b| a.batch != 0 && a.batch == b.batch) {
            self.bundle(bundle, in_order)?;
        }
        Ok(())
    }

    /// Nobody waits who could be served.
    pub(in crate::broker::tests) fn all_served(&self) -> Result<(), String> {
        for session in &self.sessions {
            if session.credit == 0 || !session.attached || self.silent(session) {
                continue;
            }
            for run in (0..self.runs.len()).filter(|run| !self.runs[*run].ended) {
                for at in 0..self.runs[run].nodes.len() {
                    let Some(spec) = self.resolved(&self.runs[run].nodes[at].spec) else {
                        continue;
                    };
                    if spec.batch.is_none() && self.is_ready(run, at) && Self::serves(session, spec)
                    {
                        return Err(format!(
                            "node {}/{at} is ready, and {session:?} has credit",
                            run + 1
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn bundle(&mut self, bundle: &[&Lease], in_order: bool) -> Result<(), String> {
        let holder = bundle[0].session;
        for lease in bundle {
            let key = lease.node;
            let run = self.run(key.run).ok_or("a lease of an unknown run")?;
            let at = key.node.0 as usize;
            let session = self
                .sessions
                .iter()
                .find(|session| session.id == lease.session)
                .ok_or_else(|| format!("{key} was given to a session that is not attached"))?;
            let spec = self
                .resolved(&self.runs[run].nodes[at].spec)
                .ok_or_else(|| format!("{key} was leased before its action was announced"))?
                .clone();
            if lease.session != holder {
                return Err("a bundle went to two sessions".to_owned());
            }
            if !self.may_be_ready(run, at) {
                return Err(format!(
                    "EARLY LEASE: {key} is {:?}",
                    self.runs[run].nodes[at]
                ));
            }
            if session.credit == 0 || self.silent(session) || !Self::serves(session, &spec) {
                return Err(format!("{key} ({spec:?}) was given to {session:?}"));
            }
            if lease.attempt.0 != self.runs[run].nodes[at].attempt + 1
                || lease.salt != self.runs[run].id.salt
            {
                return Err(format!(
                    "G3: {lease:?} follows attempt {}",
                    self.runs[run].nodes[at].attempt
                ));
            }
            let other = spec.fingerprint.is_some()
                && session.actions.iter().any(|has| {
                    has.action == spec.action
                        && has.fingerprint.is_some()
                        && has.fingerprint != spec.fingerprint
                });
            if (lease.note == Note::OtherCode) != other {
                return Err(format!(
                    "{key}: note {:?} for {spec:?} and {session:?}",
                    lease.note
                ));
            }
            if in_order {
                self.first_in_line(session, run, at, &spec)?;
            }
            let node = &mut self.runs[run].nodes[at];
            node.stage = Stage::Leased(holder);
            node.attempt += 1;
            node.digest = None;
            node.released = false;
        }
        let first = self.run(bundle[0].node.run).expect("checked");
        let spec = &self.runs[first].nodes[bundle[0].node.node.0 as usize].spec;
        let most = self
            .resolved(spec)
            .and_then(|spec| spec.batch)
            .map_or(1, |batch| batch.max_size);
        if bundle.len() > most as usize {
            return Err(format!(
                "a bundle of {} calls, {most} at most",
                bundle.len()
            ));
        }
        let since = bundle.iter().filter_map(|lease| {
            let run = self.run(lease.node.run)?;
            self.runs[run].nodes[lease.node.node.0 as usize].ready_since
        });
        if let Some(batch) = self.resolved(spec).and_then(|spec| spec.batch)
            && bundle.len() < batch.max_size as usize
            && since
                .min()
                .is_some_and(|since| since + batch.max_wait_ms > self.now)
        {
            return Err(format!(
                "a bundle of {} left before it was full or due",
                bundle.len()
            ));
        }
        for lease in bundle {
            let run = self.run(lease.node.run).expect("checked");
            self.runs[run].nodes[lease.node.node.0 as usize].ready_since = None;
        }
        self.session(holder).expect("checked").credit -= 1;
        Ok(())
    }

    /// G8: no node that this session could run comes before it. Bundles of other lanes may still be filling.
    pub(super) fn first_in_line(
        &self,
        session: &OracleSession,
        run: usize,
        at: usize,
        spec: &Arc<Spec>,
    ) -> Result<(), String> {
        let mine = self.rank(run, at);
        for other in (0..self.runs.len()).filter(|other| !self.runs[*other].ended) {
            for node in 0..self.runs[other].nodes.len() {
                let recorded = &self.runs[other].nodes[node].spec;
                let Some(theirs) = self.resolved(recorded) else {
                    continue;
                };
                let comparable = if spec.batch.is_some() {
                    *recorded == self.runs[run].nodes[at].spec
                } else {
                    theirs.batch.is_none()
                };
                if comparable
                    && self.rank(other, node) < mine
                    && self.is_ready(other, node)
                    && Self::serves(session, theirs)
                {
                    return Err(format!(
                        "G8: {}/{node} comes before {}/{at}",
                        other + 1,
                        run + 1
                    ));
                }
            }
        }
        Ok(())
    }

    /// What a new child of a node may wait for: children that exist already, and nodes that have a value.
    pub(in crate::broker::tests) fn existing(&self, run: usize, parent: usize) -> Vec<u32> {
        let run = &self.runs[run];
        let succeeded = |at: &u32| run.nodes[*at as usize].stage == Stage::Succeeded;
        let children = run.nodes.get(parent).map_or(&[][..], |node| &node.children);
        (0..run.nodes.len() as u32)
            .filter(|at| children.contains(at) || succeeded(at))
            .collect()
    }

    /// How many children a node has.
    pub(in crate::broker::tests) fn n_children(&self, key: NodeKey) -> u32 {
        let run = self.run(key.run).map(|run| &self.runs[run]);
        run.and_then(|run| run.nodes.get(key.node.0 as usize))
            .map_or(0, |node| node.children.len() as u32)
    }

    /// Whether that lease is open.
    pub(in crate::broker::tests) fn is_leased(&self, key: NodeKey, attempt: Attempt) -> bool {
        self.sessions
            .iter()
            .any(|session| self.held_by(key, attempt, session.id))
    }

    /// Whether that session has that lease.
    pub(in crate::broker::tests) fn held_by(
        &self,
        key: NodeKey,
        attempt: Attempt,
        session: SessionId,
    ) -> bool {
        self.run(key.run).is_some_and(|run| {
            let node = &self.runs[run].nodes[key.node.0 as usize];
            let held = node.stage == Stage::Leased(session) && node.attempt == attempt.0;
            held && !self.runs[run].cancelled
        })
    }

    /// All leases of a session.
    pub(in crate::broker::tests) fn held(&self, session: SessionId) -> Vec<(NodeKey, Attempt)> {
        let one = |(run, at): (usize, usize)| {
            let key = NodeKey::new(self.runs[run].id.seq, NodeIndex(at as u32));
            (key, Attempt(self.runs[run].nodes[at].attempt))
        };
        self.leases_of(session).into_iter().map(one).collect()
    }

    /// The end of a chain of tail calls.
    pub(in crate::broker::tests) fn value_node(&self, run: usize, at: usize) -> usize {
        let node = &self.runs[run].nodes[at];
        if node.tail {
            self.value_node(run, node.references[0] as usize)
        } else {
            at
        }
    }

    /// The states that users may see of a node.
    pub(in crate::broker::tests) fn states(&self, run: usize, at: usize) -> Vec<NodeState> {
        let node = &self.runs[run].nodes[at];
        vec![match node.stage {
            Stage::Succeeded => NodeState::Succeeded,
            Stage::Failed => NodeState::Failed,
            Stage::Skipped => NodeState::Skipped,
            _ if self.runs[run].cancelled => NodeState::Cancelled,
            Stage::Leased(_) => NodeState::Leased,
            Stage::Backoff => NodeState::Backoff,
            Stage::Settling => NodeState::Settling,
            Stage::Open if self.is_ready(run, at) => NodeState::Ready,
            Stage::Open if self.may_be_ready(run, at) => {
                return vec![NodeState::Ready, NodeState::Waiting];
            }
            Stage::Open => NodeState::Waiting,
        }]
    }

    /// The state of a run.
    pub(in crate::broker::tests) fn run_state(&self, run: usize) -> RunState {
        let run = &self.runs[run];
        match (run.ended, run.cancelled, run.nodes[run.root as usize].stage) {
            (false, _, _) => RunState::Running,
            (true, true, _) => RunState::Cancelled,
            (true, false, Stage::Succeeded) => RunState::Succeeded,
            (true, false, _) => RunState::Failed,
        }
    }
}
