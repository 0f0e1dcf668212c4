//! The mutations: what each breaks, how, and which tests must notice.

/// One way to break an invariant.
pub(crate) struct Mutation {
    pub(crate) name: &'static str,
    /// Its number in `docs/architecture.md`.
    pub(crate) invariant: u8,
    pub(crate) file: &'static str,
    /// Occurs exactly once in the file.
    pub(crate) find: &'static str,
    pub(crate) replace: &'static str,
    /// Tests of the library (or parts of their paths) of which at least one must fail.
    pub(crate) tests: &'static [&'static str],
}

const SCHEDULES: &str = "core::tests::swarm::a_few";

pub(crate) const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "a-push-completes-before-its-acknowledgements",
        invariant: 1,
        file: "src/protocol/push.rs",
        find: "        if self.in_flight > 0 {\n            return PushAction::None;\n        }\n",
        replace: "",
        tests: &["protocol::push", SCHEDULES],
    },
    Mutation {
        name: "a-grant-without-a-deadline",
        invariant: 1,
        file: "src/endpoint/core/reader.rs",
        find: "        self.timers\n            .at(entry.machine.next_deadline(), Timer::Arrival(slot));\n",
        replace: "",
        tests: &[SCHEDULES],
    },
    Mutation {
        name: "a-repeated-part-counts-twice",
        invariant: 2,
        file: "src/protocol/parts.rs",
        find: "        if self.arrived[word] & bit != 0 {\n            return PartOutcome::Duplicate;\n        }\n",
        replace: "",
        tests: &["protocol::parts"],
    },
    Mutation {
        name: "a-layer-is-ready-one-part-early",
        invariant: 2,
        file: "src/protocol/parts.rs",
        find: "missing_of_layer: vec![blocks.per_layer(); blocks.layers() as usize],",
        replace: "missing_of_layer: vec![blocks.per_layer().max(2) - 1; blocks.layers() as usize],",
        tests: &["protocol::parts", SCHEDULES],
    },
    Mutation {
        name: "pages-are-released-before-the-writer-has-stopped",
        invariant: 3,
        file: "src/protocol/arrival.rs",
        find: "            State::Granted => self.end(end),\n            State::Open => {",
        replace: "            State::Granted | State::Open => self.end(end),\n            #[allow(unreachable_patterns)]\n            State::Open => {",
        tests: &["protocol::arrival", SCHEDULES],
    },
    Mutation {
        name: "a-silent-writer-is-believed-to-have-stopped",
        invariant: 3,
        file: "src/protocol/arrival.rs",
        find: "                *fence_at = Time(u64::MAX);\n                ArrivalAction::Fence\n",
        replace: "                *fence_at = Time(u64::MAX);\n                self.drained()\n",
        tests: &["protocol::arrival", SCHEDULES],
    },
    Mutation {
        name: "a-silent-writer-is-never-fenced",
        invariant: 1,
        file: "src/protocol/arrival.rs",
        find: "                *fence_at = Time(u64::MAX);\n                ArrivalAction::Fence\n",
        replace: "                *fence_at = Time(u64::MAX);\n                ArrivalAction::None\n",
        tests: &["protocol::arrival", SCHEDULES],
    },
    Mutation {
        name: "the-generation-of-a-grant-is-not-compared",
        invariant: 4,
        file: "src/endpoint/core/reader.rs",
        find: ".filter(|arrival| arrival.grant.id() == open.grant)",
        replace: ".filter(|arrival| arrival.grant.id().slot == open.grant.slot)",
        tests: &["core::tests::grants", "core::tests::hostile"],
    },
    Mutation {
        name: "the-digest-of-a-grant-is-not-compared",
        invariant: 4,
        file: "src/endpoint/core/reader.rs",
        find: "!arrival.grant.digest().matches(&open.digest) ||",
        replace: "",
        tests: &["core::tests::grants", "core::tests::hostile"],
    },
    Mutation {
        name: "the-incarnation-of-a-grant-is-not-compared",
        invariant: 4,
        file: "src/endpoint/core/reader.rs",
        find: "if open.incarnation != self.incarnation {\n            return Err((",
        replace: "if false {\n            return Err((",
        tests: &["core::tests::grants", "core::tests::hostile"],
    },
    Mutation {
        name: "the-generation-of-a-tail-is-not-compared",
        invariant: 4,
        file: "src/wire/imm.rs",
        find: "if header.generation.get() != generation {",
        replace: "if false && header.generation.get() != generation {",
        tests: &[
            "wire::imm",
            "wire::tests",
            "endpoint::shared",
            "core::tests::hostile",
        ],
    },
    Mutation {
        name: "an-immediate-without-a-receive",
        invariant: 5,
        file: "src/protocol/credits.rs",
        find: "slots > self.slots || u64::from(immediates) > free",
        replace: "slots > self.slots || u64::from(immediates) > free + 1",
        tests: &["protocol::credits", SCHEDULES],
    },
    Mutation {
        name: "a-request-without-a-slot",
        invariant: 5,
        file: "src/protocol/credits.rs",
        find: "        self.slots = (self.slots + slots).min(self.depth);",
        replace: "        self.slots = self.slots + slots + 1;",
        tests: &["protocol::credits", SCHEDULES],
    },
    Mutation {
        name: "a-part-beyond-the-grant-is-taken",
        invariant: 6,
        file: "src/endpoint/core/reader.rs",
        find: "            PartOutcome::Unknown => {\n                if let Some(conn) = conn {",
        replace: "            PartOutcome::Unknown => {\n                if let Some(conn) = conn.filter(|_| false) {",
        tests: &["core::tests::grants", "core::tests::hostile"],
    },
    Mutation {
        name: "an-access-one-byte-beyond-its-region",
        invariant: 6,
        file: "src/endpoint/export.rs",
        find: "Some(end) if end <= capacity => Ok(()),",
        replace: "Some(end) if end <= capacity + 1 => Ok(()),",
        tests: &["endpoint::export"],
    },
    Mutation {
        name: "the-immediate-is-not-big-endian",
        invariant: 9,
        file: "src/fabric/verbs/poll.rs",
        find: "wc.immediate()\n",
        replace: "wc.immediate().map(u32::swap_bytes)\n",
        tests: &["fabric::verbs::poll"],
    },
];
