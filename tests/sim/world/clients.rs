//! Clients: they submit, repeat, cancel, resume and ask, and know each operation as done, refused or unknown.

use super::*;

impl World {
    pub(super) fn client(&mut self, at: usize) {
        if self.finished(&self.jobs[at]) {
            return;
        }
        let epoch = self.epoch;
        let ms = self.rng.range(0, 30);
        let job = &mut self.jobs[at];
        match job.done {
            None => self.submit(at),
            Some(_) if self.rng.percent(8) => self.submit(at),
            Some(run) if job.wants_cancel && self.rng.percent(40) => {
                job.cancel_sent = true;
                let command = Command::Cancel {
                    run,
                    reason: Arc::from("the simulation"),
                };
                self.request(ms, Who::Cancel(at), command);
            }
            Some(run) if job.ended == Some(RunState::Cancelled) => {
                self.request(ms, Who::Resume(at), Command::Resume(run));
            }
            Some(run) => {
                let query = Query::Run(run);
                self.after(
                    ms,
                    Event::Question {
                        epoch,
                        job: at,
                        query,
                    },
                );
            }
        }
        let again = self.rng.range(20, 800);
        self.after(again, Event::Client(at));
    }

    pub(super) fn request(&mut self, ms: u64, who: Who, command: Command) {
        let epoch = self.epoch;
        let event = Event::Arrives {
            epoch,
            link: None,
            who,
            command,
        };
        self.after(ms, event);
    }

    pub(super) fn submit(&mut self, at: usize) {
        let mut list = vec![at];
        if self.rng.percent(20) {
            // Another one's job with it, or the same one twice.
            list.push(self.rng.below(self.jobs.len() as u64) as usize);
        }
        let submissions = (list.iter())
            .map(|job| {
                let job = &self.jobs[*job];
                let program = &self.programs[job.program];
                Submission {
                    key: Some(job.key),
                    specs: worker::specs(),
                    nodes: program.new_nodes(job.program as u64, &program.top),
                    root: program.root as u32,
                    tags: BTreeMap::new(),
                    origin: None,
                }
            })
            .collect();
        let ms = self.rng.range(0, 200);
        let command = Command::Submit(submissions);
        if self.rng.percent(10) {
            // Repeated by the client or its network, before the first is answered.
            let ms = ms + self.rng.range(0, 50);
            self.request(ms, Who::Submit(list.clone()), command.clone());
        }
        self.request(ms, Who::Submit(list), command);
    }

    pub(super) fn answered(&mut self, job: usize, answer: Answer) {
        let epoch = self.epoch;
        let ms = self.rng.range(0, 30);
        self.after(ms, Event::Answer { epoch, job, answer });
    }

    pub(super) fn learn(&mut self, at: usize, answer: &Answer) {
        match answer {
            Answer::Run(summary) if summary.state == RunState::Running => {}
            Answer::Run(summary) => {
                let state = summary.state;
                if state == RunState::Cancelled && !self.jobs[at].cancel_sent {
                    self.violation(format!("{} was cancelled by nobody", summary.run));
                }
                self.jobs[at].ended = Some(state);
                // Too late to cancel.
                self.jobs[at].wants_cancel = false;
            }
            answer => {
                self.report.lost += 1;
                self.violation(format!("I1 job {at} was acked and is gone: {answer:?}"));
            }
        }
    }

    pub(super) fn replied(&mut self, who: Who, reply: Reply) {
        match (who, reply) {
            (Who::Submit(jobs), Reply::Submitted(results)) => {
                assert_eq!(jobs.len(), results.len(), "an entry a submission");
                for (job, result) in jobs.into_iter().zip(results) {
                    match (result, self.jobs[job].done) {
                        (Ok(submitted), None) => {
                            self.report.acked += 1;
                            self.jobs[job].done = Some(submitted.run);
                        }
                        (Ok(submitted), Some(run)) => {
                            if submitted.run != run {
                                self.report.lost += 1;
                                let new = submitted.run;
                                self.violation(format!("G11 job {job} was {run}, is {new}"));
                            }
                        }
                        (Err(no), _) if matches!(no.code, Code::Overloaded | Code::DiskFull) => {}
                        (Err(no), _) => self.violation(format!("job {job} was refused: {no}")),
                    }
                }
            }
            (Who::Cancel(job), Reply::Done(results)) => {
                if results[0].is_ok() {
                    self.jobs[job].wants_cancel = false;
                }
            }
            (Who::Resume(job), Reply::Done(results)) => match &results[0] {
                Ok(()) => {
                    self.report.resumed += 1;
                    self.jobs[job].ended = None;
                }
                Err(no) if no.code == Code::RunNotEnded => self.jobs[job].ended = None,
                Err(no) => self.violation(format!("job {job} could not be resumed: {no}")),
            },
            (Who::Attach { worker, link }, Reply::Attached(attached)) => {
                if self.workers[worker].link == link {
                    self.attached(worker, &attached.leases);
                }
            }
            (
                Who::Finish {
                    worker,
                    link,
                    items,
                },
                Reply::Done(_),
            ) => {
                if self.workers[worker].link == link {
                    for (held, _) in items {
                        self.workers[worker].unanswered.remove(&held);
                    }
                }
            }
            (Who::Create { worker, link, held }, Reply::Created(created)) => {
                if self.workers[worker].link == link
                    && let Some(lease) = self.workers[worker].flushing.remove(&held)
                {
                    match created {
                        Ok(first) => self.run(worker, &lease, Some(first)),
                        Err(no)
                            if matches!(
                                no.code,
                                Code::LeaseExpired | Code::LeaseRevoked | Code::LeaseUnknown
                            ) => {}
                        Err(no) => self.violation(format!("{} may not flush: {no}", lease.node)),
                    }
                }
            }
            (Who::Nobody, _) => {}
            (who, reply) => self.violation(format!("{who:?} got {reply:?}")),
        }
    }
}
