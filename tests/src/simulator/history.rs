//! What guests did: a forest. Each step of a guest is a node, so two copies that went different ways are told apart even where
//! they counted equally far.
#![forbid(unsafe_code)]

/// A state of the guest, and the output that it made in reaching it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Node(u32);

#[derive(Clone, Copy, Debug)]
struct Step {
    parent: u32,
    depth: u32,
    life: u32,
}

/// Every state that any copy of the guest was in.
#[derive(Debug, Default)]
pub(super) struct History {
    steps: Vec<Step>,
    lives: u32,
}

impl History {
    fn push(&mut self, step: Step) -> Node {
        self.steps.push(step);
        Node(self.steps.len() as u32 - 1)
    }

    fn at(&self, node: Node) -> Step {
        self.steps[node.0 as usize]
    }

    /// A guest that starts from nothing: a life of its own.
    pub(super) fn begin(&mut self) -> Node {
        self.lives += 1;
        let (parent, life) = (self.steps.len() as u32, self.lives);
        self.push(Step {
            parent,
            depth: 0,
            life,
        })
    }

    /// One step on.
    pub(super) fn grow(&mut self, from: Node) -> Node {
        let Step { depth, life, .. } = self.at(from);
        self.push(Step {
            parent: from.0,
            depth: depth + 1,
            life,
        })
    }

    /// Whether a copy in state `have` has been through `what`.
    pub(super) fn holds(&self, have: Node, what: Node) -> bool {
        let depth = self.at(what).depth;
        let mut at = have;
        while self.at(at).depth > depth {
            at = Node(self.at(at).parent);
        }
        at == what
    }

    /// Which start of the machine it belongs to.
    pub(super) fn life(&self, node: Node) -> u32 {
        self.at(node).life
    }

    /// How many steps since that start.
    pub(super) fn depth(&self, node: Node) -> u32 {
        self.at(node).depth
    }
}
