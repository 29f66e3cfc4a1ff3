//! Workers and their connections: attach, credit, run, complete, repeat.

use super::*;

impl World {
    pub(super) fn cut(&mut self, at: usize, goodbye: Command) {
        let worker = &mut self.workers[at];
        if !worker.connected {
            return;
        }
        worker.connected = false;
        worker.link += 1;
        if self.engine.is_some() {
            self.arrived.push(Request {
                ticket: None,
                command: goodbye,
            });
        }
        let ms = self.rng.range(5, 1_500);
        self.after(ms, Event::Connect(at));
    }

    pub(super) fn connect(&mut self, at: usize) {
        if self.workers[at].connected || self.engine.is_none() {
            return;
        }
        if self.workers[at].frozen_until > self.now {
            let ms = self.workers[at].frozen_until - self.now;
            self.after(ms, Event::Connect(at));
            return;
        }
        let worker = &mut self.workers[at];
        worker.link += 1;
        worker.connected = true;
        let link = worker.link;
        let attach = worker.attach();
        self.up(
            at,
            Who::Attach { worker: at, link },
            Command::Attach(attach),
        );
    }

    pub(super) fn attached(&mut self, at: usize, leases: &[Held]) {
        let foreign: Vec<Completion> = (leases.iter())
            .filter(|held| !self.workers[at].knows(held))
            .map(|(node, attempt)| worker::release(*node, *attempt, LeaseToken([0; 16])))
            .collect();
        let again: Vec<Completion> = self.workers[at].unanswered.values().cloned().collect();
        self.workers[at].outbox.clear();
        self.send(at, again);
        self.send(at, foreign);
        let flushing: Vec<Lease> = self.workers[at].flushing.values().cloned().collect();
        for lease in flushing {
            self.run(at, &lease, None);
        }
        let worker = &self.workers[at];
        let free = worker.slots.saturating_sub(worker.bundles.len());
        self.credit(at, free as u32);
    }

    pub(super) fn credit(&mut self, at: usize, calls: u32) {
        if calls > 0 && self.workers[at].connected {
            let session = self.workers[at].session;
            self.up(at, Who::Nobody, Command::Credit { session, calls });
        }
    }

    pub(super) fn send(&mut self, at: usize, completions: Vec<Completion>) {
        if completions.is_empty() || !self.workers[at].connected {
            return;
        }
        let items = (completions.iter())
            .map(|c| ((c.node, c.attempt), counts(&c.end)))
            .collect();
        let link = self.workers[at].link;
        let who = Who::Finish {
            worker: at,
            link,
            items,
        };
        self.up(at, who, Command::Finish(completions));
    }

    pub(super) fn beat(&mut self, at: usize) {
        let worker = &self.workers[at];
        if worker.frozen_until > self.now {
            let ms = worker.frozen_until - self.now;
            self.after(ms, Event::Beat(at));
            return;
        }
        if worker.connected && self.engine.is_some() {
            self.touched.insert(worker.session);
            let outbox = std::mem::take(&mut self.workers[at].outbox);
            self.send(at, outbox);
        }
        self.after(LEASE_MS / 3, Event::Beat(at));
    }

    pub(super) fn work(&mut self, at: usize, leases: Vec<Lease>) {
        let mut bundles: Vec<Vec<Lease>> = Vec::new();
        for lease in leases {
            match bundles.last_mut() {
                Some(bundle) if lease.batch != 0 && bundle[0].batch == lease.batch => {
                    bundle.push(lease);
                }
                _ => bundles.push(vec![lease]),
            }
        }
        for leases in bundles {
            self.counter += 1;
            let bundle = self.counter;
            let life = self.workers[at].life;
            self.workers[at].bundles.insert(bundle, leases);
            let ms = match self.rng.below(40) {
                0 => self.rng.range(LEASE_MS, 3 * LEASE_MS),
                1..=10 => self.rng.range(20, 400),
                _ => self.rng.range(0, 20),
            };
            self.after(
                ms,
                Event::Ends {
                    worker: at,
                    life,
                    bundle,
                },
            );
        }
    }

    pub(super) fn revoked(&mut self, at: usize, held: Held) {
        let worker = &mut self.workers[at];
        for leases in worker.bundles.values_mut() {
            // An empty bundle still gives its credit back when it ends.
            leases.retain(|lease| (lease.node, lease.attempt) != held);
        }
        worker.flushing.remove(&held);
    }

    pub(super) fn ends(&mut self, at: usize, life: u64, bundle: u64) {
        let worker = &self.workers[at];
        if worker.life != life {
            return;
        }
        if worker.frozen_until > self.now {
            let ms = worker.frozen_until - self.now + 1;
            self.after(
                ms,
                Event::Ends {
                    worker: at,
                    life,
                    bundle,
                },
            );
            return;
        }
        for lease in self.workers[at].bundles.remove(&bundle).unwrap_or_default() {
            self.run(at, &lease, None);
        }
        if self.rng.percent(70) {
            let outbox = std::mem::take(&mut self.workers[at].outbox);
            if self.rng.percent(6) {
                self.send(at, outbox.clone());
            }
            self.send(at, outbox);
        }
        self.credit(at, 1);
    }

    pub(super) fn run(
        &mut self,
        at: usize,
        lease: &Lease,
        children: Option<dagorama::broker::types::NodeIndex>,
    ) {
        let held = (lease.node, lease.attempt);
        let reader = Arc::clone(&self.reader);
        let ran = worker::run(&*reader, &self.programs, lease, &mut self.raised, children);
        match ran {
            Ran::Completion(completion) => {
                self.workers[at].unanswered.insert(held, completion.clone());
                self.workers[at].outbox.push(completion);
            }
            Ran::Flush(create) => {
                self.workers[at].flushing.insert(held, lease.clone());
                let link = self.workers[at].link;
                if self.workers[at].connected {
                    let who = Who::Create {
                        worker: at,
                        link,
                        held,
                    };
                    self.up(at, who, Command::CreateChildren(create));
                }
            }
            Ran::Stale => {
                let completion = worker::release(lease.node, lease.attempt, lease.token);
                self.workers[at].unanswered.insert(held, completion.clone());
                self.workers[at].outbox.push(completion);
            }
        }
    }
}
