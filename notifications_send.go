// This file sends the notifications that are queued to webhooks: one worker claims deliveries in the database, so that
// several processes share the work and a killed one loses none. Nothing here opens a secret: secrets.go signs, and
// upstream.go checks each URL and each address that is dialled. What a receiver answers is neither stored nor shown.
package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	deliveryTimeout  = 10 * time.Second
	deliveryStopWait = 2 * time.Second
)

// deliver sends what is queued, until ctx is done. Each webhook has one goroutine at a time, so that one that is slow
// keeps no other waiting.
func (n *notifier) deliver(ctx context.Context) {
	var sending sync.WaitGroup
	defer sending.Wait()
	var mu sync.Mutex
	busy := map[int64]bool{} // by webhook
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-n.wake:
		}
		if !n.active.Load() {
			continue
		}
		hooks, err := n.store.listWebhooks(ctx)
		if err != nil {
			continue // the other worker reports it
		}
		for i := range hooks {
			w := &hooks[i]
			mu.Lock()
			skip := busy[w.seq] || !w.active
			busy[w.seq] = busy[w.seq] || !skip
			mu.Unlock()
			if skip {
				continue
			}
			sending.Go(func() {
				n.deliverTo(ctx, w)
				mu.Lock()
				defer mu.Unlock()
				delete(busy, w.seq)
			})
		}
	}
}

// deliverTo sends what is due to a webhook.
func (n *notifier) deliverTo(ctx context.Context, w *webhookRow) {
	due, err := n.store.dueDeliveries(ctx, w.seq, time.Now().UnixMilli(), deliveriesAtOnce)
	for i := 0; i < len(due) && err == nil && ctx.Err() == nil; i++ {
		err = n.attempt(ctx, w, &due[i])
	}
	if err != nil && ctx.Err() == nil {
		n.log.Warn("a delivery could not be recorded; it will be repeated", "webhook", w.id, "error", err)
	}
}

// attempt sends a delivery, unless another process does.
func (n *notifier) attempt(ctx context.Context, w *webhookRow, d *deliveryRow) error {
	now := time.Now().UnixMilli()
	if ok, err := n.store.claimDelivery(ctx, d, now, now+deliveryLeaseMS); !ok || err != nil {
		return err
	}
	return n.sendClaimed(ctx, w, d)
}

// sendClaimed sends a delivery that this process has claimed, and records the result.
func (n *notifier) sendClaimed(ctx context.Context, w *webhookRow, d *deliveryRow) error {
	res := n.send(ctx, w, &d.of)
	if res.problem == "" || ctx.Err() == nil { // otherwise this process ends, which says nothing of the receiver
		d.record(res, time.Now().UnixMilli(), rand.Float64())
	}
	if d.state == deliveryFailed {
		n.log.Warn("a notification could not be delivered", "webhook", w.id, "delivery", d.id, "problem", d.problem)
	}
	return n.store.saveDelivery(context.WithoutCancel(ctx), d)
}

// send makes one request to a webhook.
func (n *notifier) send(ctx context.Context, w *webhookRow, msg *notification) deliveryResult {
	ending := ctx
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deliveryTimeout)
	defer cancel()
	// A stop waits a moment for the answer: without it, the notification is sent again.
	stop := context.AfterFunc(ending, func() { time.AfterFunc(deliveryStopWait, cancel) })
	defer stop()
	now := time.Now()
	body, err := notificationBody(w.format, msg)
	if err != nil {
		return deliveryResult{problem: "the notification cannot be read", final: true}
	}
	req, err := n.newRequest(ctx, w, msg.id, body, now)
	if err != nil {
		return deliveryResult{problem: "the URL or the secret cannot be used as it is stored", final: true}
	}
	res, err := n.transport.RoundTrip(req) // which follows no redirect
	switch {
	case err != nil && errors.Is(err, errForbiddenAddress):
		return deliveryResult{problem: "resolves to an address that is not allowed"}
	case err != nil && ctx.Err() != nil:
		return deliveryResult{problem: "did not answer in time"}
	case err != nil && isDialError(err):
		return deliveryResult{problem: "could not be reached"}
	case err != nil:
		return deliveryResult{problem: "the connection failed, or its certificate is not valid"}
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10)) // its text is of no interest
	out := deliveryResult{status: res.StatusCode, final: res.StatusCode == http.StatusGone}
	if res.StatusCode < 200 || res.StatusCode > 299 {
		text := strconv.Itoa(res.StatusCode) + " " + http.StatusText(res.StatusCode)
		out.problem = "answered " + strings.TrimSpace(text)
		if seconds, err := strconv.ParseInt(res.Header.Get("Retry-After"), 10, 64); err == nil && seconds > 0 {
			out.wait = min(seconds, deliveryLastWait/1000) * 1000
		}
	}
	return out
}

// newRequest makes the request of a delivery, with the headers of Standard Webhooks.
func (n *notifier) newRequest(ctx context.Context, w *webhookRow, id string, body []byte, now time.Time,
) (*http.Request, error) {
	target, err := n.sealer.open(w.sealedURL, webhookContext(w.id, webhookURLPart))
	if err != nil {
		return nil, err
	}
	u, err := parseWebhookURL(target, n.allowPrivate)
	if err != nil {
		return nil, err
	}
	current, err := n.sealer.open(w.sealedSecret, webhookContext(w.id, webhookSecretPart))
	if err != nil {
		return nil, err
	}
	secrets := []secret{current}
	if len(w.oldSecret) > 0 && now.UnixMilli() < deref(w.oldSecretUntil) {
		old, err := n.sealer.open(w.oldSecret, webhookContext(w.id, webhookOldSecretPart))
		if err != nil {
			return nil, err
		}
		secrets = append(secrets, old)
	}
	timestamp := strconv.FormatInt(now.Unix(), 10)
	signature, err := signWebhook(secrets, id, timestamp, body)
	if err != nil {
		return nil, err
	}
	req := &http.Request{Method: http.MethodPost, URL: u, Host: u.Host, Header: http.Header{
		"Content-Type": {"application/json"}, "User-Agent": {"llm-proxy"}, "Webhook-Id": {id},
		"Webhook-Timestamp": {timestamp}, "Webhook-Signature": {signature}},
		Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body))}
	return req.WithContext(ctx), nil
}
