//! Waiting between attempts.

use super::link::Link;
use ::kube::runtime::utils::Backoff as _;
use ::kube::runtime::watcher::DefaultBackoff;
use futures::future::BoxFuture;
use futures::{FutureExt as _, Stream, StreamExt as _};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::sleep;

/// A stream that rests after an error: as long as client-go's would, half a minute at most, or until the server serves
/// somebody else of us again.
pub(super) struct Patient<S> {
    stream: S,
    link: Link,
    backoff: DefaultBackoff,
    rest: Option<BoxFuture<'static, ()>>,
}

impl<S> Patient<S> {
    pub(super) fn new(stream: S, link: Link) -> Self {
        Self { stream, link, backoff: DefaultBackoff::default(), rest: None }
    }
}

impl<T, E, S: Stream<Item = Result<T, E>> + Unpin> Stream for Patient<S> {
    type Item = Result<T, E>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(rest) = &mut self.rest {
            ready!(rest.poll_unpin(context));
            self.rest = None;
        }
        let item = ready!(self.stream.poll_next_unpin(context));
        match item {
            Some(Err(_)) => {
                let (time, serves) = (self.backoff.next().unwrap_or(Duration::MAX), self.link.serves());
                self.rest = Some(Box::pin(async move {
                    tokio::select! {
                        () = sleep(time) => {}
                        () = serves => {}
                    }
                }));
            }
            _ => self.backoff.reset(),
        }
        Poll::Ready(item)
    }
}
