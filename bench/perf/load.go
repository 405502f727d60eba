// This file makes the load, with connections that send one request after the other, and measures what it costs the target.
package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// uniquePlace in a body is replaced by another number for each call.
const uniquePlace = "@@@@@@@@@@@@@@@@@@"

type measured struct {
	cpuPerCall float64 // microseconds
	p50        float64 // microseconds
}

// load keeps conns connections busy with body for d, after a warm-up of d/4. With a rate, calls are sent at fixed times
// instead, and latency counts from the time at which a call was due.
func load(ctx context.Context, t target, body string, conns, rate int, d time.Duration) (measured, error) {
	ctx, cancel := context.WithTimeout(ctx, d+d/4)
	defer cancel()
	begin := time.Now().Add(d / 4)
	var mu sync.Mutex
	var took []time.Duration
	var failed error
	var cpu0 float64
	var wait sync.WaitGroup
	wait.Go(func() {
		time.Sleep(time.Until(begin))
		mu.Lock()
		defer mu.Unlock()
		cpu0 = cpuTime(t.pid)
	})
	for i := range conns {
		wait.Go(func() {
			mine, err := worker(ctx, t, body, begin, i, conns, rate)
			mu.Lock()
			defer mu.Unlock()
			took = append(took, mine...)
			if failed == nil {
				failed = err
			}
		})
	}
	wait.Wait()
	cpu := cpuTime(t.pid) - cpu0
	if failed != nil || len(took) == 0 {
		return measured{}, fmt.Errorf("load on %s: %d calls, %w", t.name, len(took), failed)
	}
	slices.Sort(took)
	return measured{cpu / float64(len(took)) * 1e6, float64(took[len(took)/2].Nanoseconds()) / 1e3}, nil
}

func worker(ctx context.Context, t target, body string, begin time.Time, i, conns, rate int) ([]time.Duration, error) {
	conn, err := net.Dial("tcp", t.addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	br, request, streamed := bufio.NewReader(conn), t.request(body), strings.Contains(body, `"stream":true`)
	var took []time.Duration
	due := time.Now()
	var gap time.Duration
	if rate > 0 {
		gap = time.Second * time.Duration(conns) / time.Duration(rate)
		due = due.Add(gap * time.Duration(i) / time.Duration(conns))
	}
	at := bytes.Index(request, []byte(uniquePlace))
	for calls := 0; ctx.Err() == nil; calls++ {
		if at >= 0 {
			copy(request[at:], fmt.Sprintf("%0*x", len(uniquePlace), begin.UnixNano()/1e6<<28|int64(i)<<20|int64(calls)))
		}
		if rate > 0 {
			time.Sleep(time.Until(due))
		} else {
			due = time.Now()
		}
		if _, err := conn.Write(request); err != nil {
			return took, err
		}
		m, err := readMessage(br, false)
		if err != nil || !bytes.HasPrefix(m.head, []byte("HTTP/1.1 200 ")) || streamed && !bytes.HasSuffix(m.body, []byte("[DONE]\n\n")) {
			return took, fmt.Errorf("got %.60s %.200s: %w", m.head, m.body, err)
		}
		if due.After(begin) {
			took = append(took, time.Since(due))
		}
		due = due.Add(gap)
	}
	return took, nil
}

// idleStreams opens n streams that send one word and then nothing, and returns the KiB of memory that each costs the target.
func idleStreams(ctx context.Context, t target, n int) (float64, error) {
	before := rss(t.pid)
	request := t.request(chatBody(`"stream":true,"user":"idle"`))
	for range n {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", t.addr)
		if err != nil {
			return 0, err
		}
		defer conn.Close()
		if _, err := conn.Write(request); err != nil {
			return 0, err
		}
		if line, err := bufio.NewReaderSize(conn, 64).ReadString('\n'); err != nil || !strings.Contains(line, "200") {
			return 0, fmt.Errorf("idle stream: %q %w", line, err)
		}
	}
	time.Sleep(time.Second)
	return (rss(t.pid) - before) / float64(n), nil
}

// cpuTime returns the seconds of CPU that the threads of a process have used.
func cpuTime(pid int) float64 {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid)) // in nanoseconds; stat counts in hundredths
	var sum float64
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		used, _, _ := strings.Cut(string(b), " ")
		nanos, _ := strconv.ParseFloat(used, 64)
		sum += nanos
	}
	return sum / 1e9
}

// rss returns the KiB of memory that a process holds.
func rss(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	v, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
	return v
}
