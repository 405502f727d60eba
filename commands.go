package main

import "context"

func (p *program) demo(ctx context.Context) error                 { return nil }
func (p *program) doctor(ctx context.Context, args []string) error  { return nil }
func (p *program) healthcheck(ctx context.Context) error            { return nil }
func (p *program) backup(ctx context.Context, args []string) error  { return nil }
func (p *program) restore(ctx context.Context, args []string) error { return nil }
