//! What is asked next: mostly sense, some of it faults.

use super::*;

impl Schedule {
    pub(super) fn any_run(&mut self) -> Option<RunId> {
        let n = self.oracle.runs.len();
        (n > 0).then(|| self.oracle.runs[self.rng.index(n)].id)
    }

    pub(super) fn nodes(&mut self, most: u64, existing: &[u32]) -> Vec<NewNode> {
        let n = 1 + self.rng.below(most);
        let mut nodes: Vec<NewNode> = Vec::new();
        for i in 0..n {
            let mut inputs = Vec::new();
            for _ in 0..self.rng.below(3) {
                let mode = *self.rng.pick(&[
                    InputUse::Value,
                    InputUse::Value,
                    InputUse::After,
                    InputUse::Outcome,
                ]);
                if i > 0 && self.rng.chance(80) {
                    let first = self.rng.below(i);
                    let count = 1 + self.rng.below(i - first) as u32;
                    inputs.push(NewInput {
                        first: NodeRef::New(first as u32),
                        count,
                        mode,
                    });
                } else if !existing.is_empty() {
                    let first = NodeRef::Existing(NodeIndex(*self.rng.pick(existing)));
                    inputs.push(NewInput {
                        first,
                        count: 1,
                        mode,
                    });
                }
            }
            if self.rng.chance(1) {
                self.fault("cycle");
                let first = NodeRef::New(i as u32);
                inputs.push(NewInput {
                    first,
                    count: 1,
                    mode: InputUse::Value,
                });
            }
            let delay = match self.rng.below(12) {
                0 => Delay::For(1 + self.rng.below(15)),
                1 => Delay::Until(WallTime(self.wall + self.rng.below(30))),
                _ => Delay::None,
            };
            let spec = if self.rng.chance(50) {
                0
            } else {
                self.rng.index(self.specs.len())
            } as u32;
            nodes.push(NewNode {
                spec,
                arguments: payload(Codec::Json, b"1"),
                inputs,
                delay,
            });
        }
        nodes
    }

    pub(super) fn command(&mut self) -> Command {
        let w = session(["w1", "w2", "w3"][self.rng.index(3)]);
        let mut roll = self.rng.below(100);
        if self.calm && (84..=89).contains(&roll) {
            roll = 40;
        }
        match roll {
            0..=10 => self.submit(),
            11..=14 => self.attach(),
            15..=26 => Command::Credit {
                session: w,
                calls: 1 + self.rng.below(4) as u32,
            },
            27..=57 => self.finish(),
            58..=62 => self.create(),
            63..=76 => Command::Tick,
            77..=83 => Command::Touch(vec![w]),
            84..=86 => {
                self.fault("detach");
                Command::Detach(w)
            }
            87 => {
                self.fault("close");
                Command::Close(w)
            }
            88..=89 => {
                self.fault("cancel");
                let run = self.any_run().unwrap_or(crate::broker::tests::parse::GHOST);
                Command::Cancel {
                    run,
                    reason: "asked".into(),
                }
            }
            90..=92 => {
                self.fault("resume");
                Command::Resume(self.any_run().unwrap_or(crate::broker::tests::parse::GHOST))
            }
            93..=95 => {
                let output: Arc<str> = if self.rng.chance(70) {
                    "all".into()
                } else {
                    "good".into()
                };
                let next = self
                    .oracle
                    .outboxes
                    .get(&output)
                    .map_or(0, |outbox| outbox.next);
                let n = 1 + self.rng.below(4);
                let mut seqs: Vec<u64> = (0..n)
                    .filter(|_| next > 0)
                    .map(|_| 1 + self.rng.below(next))
                    .collect();
                if self.rng.chance(5) || seqs.is_empty() {
                    seqs.push(next + 1);
                }
                Command::ConfirmOutbox { output, seqs }
            }
            96 => Command::Expire(
                (0..3)
                    .filter_map(|_| self.any_run())
                    .map(|run| run.seq)
                    .take(1)
                    .collect(),
            ),
            97 => Command::DropDeadLetter {
                route: "pages".into(),
                seq: 1 + self.rng.below(3),
            },
            98 => Command::SeekInbox {
                route: "pages".into(),
                partition: "p".into(),
                next: self.rng.below(5),
            },
            _ => self.dead_letter(),
        }
    }

    pub(super) fn origin(&mut self) -> Origin {
        let at = self
            .oracle
            .positions
            .get(&("pages".into(), "p".into()))
            .copied()
            .unwrap_or(0);
        let identity = match self.rng.below(4) {
            0..=1 => {
                let position = (at + self.rng.below(3)).saturating_sub(1);
                if position < at {
                    self.fault("repeated message");
                }
                Identity::Position {
                    partition: "p".into(),
                    position,
                    next: position + 1,
                }
            }
            2 => Identity::Key(KeyHash(0x1_0000 + u128::from(self.rng.below(6)))),
            _ => Identity::DeadLetter {
                seq: 1 + self.rng.below(3),
            },
        };
        Origin {
            route: "pages".into(),
            identity,
        }
    }

    pub(super) fn dead_letter(&mut self) -> Command {
        let mut origin = self.origin();
        if matches!(origin.identity, Identity::DeadLetter { .. }) {
            origin.identity = Identity::None;
        }
        Command::DeadLetter(vec![DeadLetter {
            origin,
            code: "UNDECODABLE".into(),
            reason: "not json".into(),
            attempts: 5,
            coordinates: BTreeMap::new(),
            body: payload(Codec::Raw, b"?"),
        }])
    }

    pub(super) fn submit(&mut self) -> Command {
        if !self.submitted.is_empty() && self.rng.chance(12) {
            self.fault("repeated submission");
            let mut again = self.rng.pick(&self.submitted).clone();
            if let Some(key) = &mut again.key
                && self.rng.chance(20)
            {
                key.content ^= 1;
            }
            return Command::Submit(vec![again]);
        }
        let n = if self.rng.chance(85) { 1 } else { 2 };
        let submissions: Vec<Submission> = (0..n)
            .map(|_| {
                let nodes = self.nodes(5, &[]);
                let keyed = self.rng.chance(30);
                let key = SubmissionKey {
                    hash: KeyHash(u128::from(self.rng.next())),
                    content: self.rng.next(),
                };
                let origin = (!keyed && self.rng.chance(25)).then(|| self.origin());
                Submission {
                    key: keyed.then_some(key),
                    specs: self.specs.clone(),
                    root: if self.rng.chance(80) {
                        nodes.len() as u32 - 1
                    } else {
                        0
                    },
                    nodes,
                    tags: BTreeMap::new(),
                    origin,
                }
            })
            .collect();
        self.submitted
            .extend(submissions.iter().filter(|s| s.key.is_some()).cloned());
        Command::Submit(submissions)
    }

    pub(super) fn attach(&mut self) -> Command {
        let name = ["w1", "w2", "w3"][self.rng.index(3)];
        let code = if self.rng.chance(70) { "h1" } else { "h2" };
        let mut actions = vec![Arc::new(Spec {
            fingerprint: Some(code.into()),
            ..plain_spec("f")
        })];
        actions.extend(
            [2, 3, 4]
                .into_iter()
                .filter(|_| self.rng.chance(80))
                .map(|i| Arc::clone(&self.specs[i])),
        );
        let mut queues: Vec<Arc<str>> = vec!["default".into()];
        if self.rng.chance(70) {
            queues.push("slow".into());
        }
        let tolerations = if self.rng.chance(60) {
            vec!["gpu".into()]
        } else {
            vec![]
        };
        Command::Attach(Attach {
            session: session(name),
            name: name.into(),
            queues,
            tolerations,
            actions,
        })
    }

    /// Children of that node that exist already, and nodes with a value: what a new child may wait for; sometimes any node.
    pub(super) fn may_wait_for(&mut self, node: NodeKey) -> Vec<u32> {
        let Some(run) = self.oracle.run(node.run) else {
            return Vec::new();
        };
        if self.rng.chance(3) {
            self.fault("foreign reference");
            return (0..self.oracle.runs[run].nodes.len() as u32).collect();
        }
        self.oracle.existing(run, node.node.0 as usize)
    }

    pub(super) fn finish(&mut self) -> Command {
        if !self.sent.is_empty() && self.rng.chance(15) {
            self.fault("repeated completion");
            let mut again = self.rng.pick(&self.sent).clone();
            if self.rng.chance(25) {
                again.digest ^= 1;
            }
            return Command::Finish(vec![again]);
        }
        let n = if self.rng.chance(75) {
            1
        } else {
            1 + self.rng.below(4)
        };
        let items: Vec<Completion> = (0..n).filter_map(|_| self.completion()).collect();
        if items.is_empty() {
            return Command::Tick;
        }
        self.sent.extend(items.iter().cloned());
        Command::Finish(items)
    }

    /// A lease that some worker had: mostly one that is still open.
    pub(super) fn some_lease(&mut self) -> Option<(NodeKey, Attempt, LeaseToken)> {
        let open: Vec<_> = self
            .leases
            .iter()
            .filter(|(node, attempt, _)| self.oracle.is_leased(*node, *attempt))
            .copied()
            .collect();
        if !open.is_empty() && self.rng.chance(90) {
            return Some(*self.rng.pick(&open));
        }
        (!self.leases.is_empty()).then(|| *self.rng.pick(&self.leases))
    }

    pub(super) fn completion(&mut self) -> Option<Completion> {
        let (node, attempt, mut token) = self.some_lease()?;
        if self.rng.chance(2) {
            self.fault("forged");
            token = FORGED;
        }
        let existing = self.may_wait_for(node);
        let mut children = Vec::new();
        if self.rng.chance(30) {
            children = self.nodes(3, &existing);
        }
        let some = |schedule: &mut Self| match children.len() {
            0 => existing
                .first()
                .map(|_| NodeRef::Existing(NodeIndex(*schedule.rng.pick(&existing)))),
            n => Some(NodeRef::New(schedule.rng.index(n) as u32)),
        };
        let error = || payload(Codec::Json, b"{}");
        let end = match self.rng.below(12) {
            0 => AttemptEnd::Failed {
                error: error(),
                retryable: false,
                timed_out: false,
            },
            1..=2 => AttemptEnd::Failed {
                error: error(),
                retryable: true,
                timed_out: false,
            },
            3 => AttemptEnd::Failed {
                error: error(),
                retryable: true,
                timed_out: true,
            },
            4 => AttemptEnd::Released,
            5..=6 => match some(self) {
                Some(to) => AttemptEnd::Tail(to),
                None => AttemptEnd::Value(payload(Codec::Json, b"1")),
            },
            7 => {
                let mode = InputUse::Value;
                let first = some(self);
                let references = first.map(|first| NewInput {
                    first,
                    count: 1,
                    mode,
                });
                let body = payload(Codec::Json, b"[]");
                AttemptEnd::Structure {
                    body,
                    references: references.into_iter().collect(),
                }
            }
            _ => AttemptEnd::Value(payload(Codec::Json, b"1")),
        };
        let digest = self.rng.next() | 1;
        Some(Completion {
            node,
            attempt,
            token,
            digest,
            specs: self.specs.clone(),
            children,
            end,
        })
    }

    pub(super) fn create(&mut self) -> Command {
        if !self.created.is_empty() && self.rng.chance(25) {
            self.fault("repeated creation");
            return Command::CreateChildren(self.rng.pick(&self.created).clone());
        }
        let Some((node, attempt, token)) = self.some_lease() else {
            return Command::Tick;
        };
        let existing = self.may_wait_for(node);
        let mut children = self.nodes(2, &existing);
        for child in &mut children {
            child.inputs.retain(
                |input| !matches!(input.first, NodeRef::New(at) if at >= 1 || input.count > 1),
            );
        }
        children[0]
            .inputs
            .retain(|input| matches!(input.first, NodeRef::Existing(_)));
        let first_child = self.oracle.n_children(node) + u32::from(self.rng.chance(5));
        let specs = self.specs.clone();
        let request = CreateChildren {
            node,
            attempt,
            token,
            first_child,
            specs,
            children,
        };
        Command::CreateChildren(request)
    }
}
