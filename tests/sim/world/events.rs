//! What happens, and what breaks.

use super::*;

impl World {
    pub(super) fn handle(&mut self, event: Event) {
        match event {
            Event::Client(job) => self.client(job),
            Event::Arrives {
                epoch,
                link,
                who,
                command,
            } => {
                let linked = link.is_none_or(|(worker, link)| self.workers[worker].link == link);
                if epoch == self.epoch && linked && self.engine.is_some() {
                    self.counter += 1;
                    let ticket = Ticket(self.counter);
                    if let Some((worker, _)) = link {
                        self.touched.insert(self.workers[worker].session);
                    }
                    self.waiting.insert(ticket, who);
                    self.arrived.push(Request {
                        ticket: Some(ticket),
                        command,
                    });
                }
            }
            Event::Question { epoch, job, query } => {
                if epoch == self.epoch && self.engine.is_some() {
                    self.asked.push_back((job, query));
                }
            }
            Event::Reply { epoch, who, reply } => {
                if epoch == self.epoch {
                    self.replied(who, reply);
                }
            }
            Event::Answer { epoch, job, answer } => {
                if epoch == self.epoch {
                    self.learn(job, &answer);
                }
            }
            Event::Leases {
                epoch,
                worker,
                link,
                leases,
            } => {
                if epoch == self.epoch && self.workers[worker].link == link {
                    self.work(worker, leases);
                }
            }
            Event::Revoked {
                epoch,
                worker,
                link,
                held,
            } => {
                if epoch == self.epoch && self.workers[worker].link == link {
                    self.revoked(worker, held);
                }
            }
            Event::Connect(worker) => self.connect(worker),
            Event::Beat(worker) => self.beat(worker),
            Event::Ends {
                worker,
                life,
                bundle,
            } => self.ends(worker, life, bundle),
            Event::Read { epoch, run } => {
                if epoch == self.epoch {
                    // Read now, arrives later: a turn in between may change the run.
                    let facts = read_run(&*self.reader, run);
                    let ms = self.rng.below(40);
                    self.after(ms, Event::Loaded { epoch, run, facts });
                }
            }
            Event::Loaded { epoch, run, facts } => {
                if epoch == self.epoch
                    && let Some(engine) = &mut self.engine
                {
                    engine.loaded(run, facts);
                }
            }
            Event::Fault => self.fault(),
            Event::Start => self.start(),
            Event::Wake => {}
        }
    }

    pub(super) fn fault(&mut self) {
        if self.now >= FAULTS_MS {
            let mut disk = self.disk.lock().unwrap();
            disk.pressure = Pressure::None;
            disk.fate = Fate::Works;
            return;
        }
        let worker = self.rng.below(self.workers.len() as u64) as usize;
        let kind = match self.rng.below(13) {
            0 | 1 => return self.fault_and_next(|world| world.crash("crash")),
            2 => {
                self.disk.lock().unwrap().fate = Fate::Lost;
                "commit lost"
            }
            3 => {
                self.disk.lock().unwrap().fate = Fate::Unsaid;
                "commit unsaid"
            }
            4 | 5 => {
                self.cut(worker, Command::Detach(self.workers[worker].session));
                "cut"
            }
            6 | 7 => {
                self.cut(worker, Command::Detach(self.workers[worker].session));
                let session = self.rng.next();
                self.workers[worker].reborn(session);
                "kill"
            }
            8 => {
                self.cut(worker, Command::Close(self.workers[worker].session));
                let session = self.rng.next();
                self.workers[worker].reborn(session);
                "close"
            }
            9 | 10 => {
                self.workers[worker].frozen_until = self.now + self.rng.range(10, 2 * LEASE_MS);
                "freeze"
            }
            11 => {
                let jump = self.rng.range(0, 200_000_000);
                self.calendar = (self.calendar + jump).saturating_sub(100_000_000);
                "calendar"
            }
            _ => {
                let pressure = [
                    Pressure::None,
                    Pressure::Slow,
                    Pressure::Stop,
                    Pressure::DiskFull,
                ];
                let pressure = pressure[self.rng.below(4) as usize];
                self.disk.lock().unwrap().pressure = pressure;
                "pressure"
            }
        };
        self.note(&kind);
        *self.report.faults.entry(kind).or_default() += 1;
        self.fault_and_next(|_| {});
    }

    pub(super) fn fault_and_next(&mut self, fault: impl FnOnce(&mut Self)) {
        fault(self);
        let ms = self.rng.range(50, 1_500);
        self.after(ms, Event::Fault);
    }
}
